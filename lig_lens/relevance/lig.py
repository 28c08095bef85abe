"""LIG's own rollout: the shares of `Flow.rollout`, followed back from where the output looks.

In every block Integrated Gradients say what sources contribute to heads (`attn`), and heads and the skip connection to
the next residual vector (`mlp`), both by how far vectors move. Edges are composed by a rule, those that enter one
destination divided by their sum, and relevance goes back along these shares:

    r_i = sum_j S_l[i, j] r_j,       sum_i S_l[i, j] = 1.

It starts at what the output looks at, which adds up to 1, and so do scores; they know the class by that alone. Shares
have signs: what takes away from a destination's vector is negative. `zero` baselines count the skip connection, without
which all positions come to be made of the same tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from lig_lens.attribution import flow_of
from lig_lens.flow.compose import RULES, shares
from lig_lens.relevance.explained import Explained
from lig_lens.relevance.follow import follow
from lig_lens.relevance.method import Advance, Answer, Method
from lig_lens.settings import Settings
from lig_lens.targets.resolve import as_target


@dataclass(frozen=True)
class Lig(Method):
    """LIG's rollout; see the module. Edges of attention are shares of each destination.

    Attributes:
        rule: of composition within a block; see `Flow.compose`.
        attn_baseline: where paths of residual vectors start; see `attribute`.
        mlp_baseline: where paths of what follows attention start.
    """

    name = "lig"
    CHOICES: ClassVar = {"rule": tuple(RULES)}

    rule: str = "conserving"
    attn_baseline: str = "zero"
    mlp_baseline: str = "zero"

    def explain(self, what: Explained, advance: Advance) -> Answer:
        """See the base class."""
        settings = Settings.of(
            maps=("attn", "mlp"),
            attn_baseline=self.attn_baseline,
            mlp_baseline=self.mlp_baseline,
            target=as_target("l2"),
            tol=what.budget.tol,
            max_nodes=what.budget.max_nodes,
            max_batch_tokens=what.budget.max_batch_tokens,
            progress=False,
        )
        flow = flow_of(what.down.forward.stack, what.inputs, settings)
        divided = shares(flow, self.rule)
        edges = divided.heads.sum(1) + torch.diag_embed(divided.skip)
        fused, rolled = follow(what.readout.cpu().to(edges), edges, lambda block: block)
        return Answer(scores=rolled[0], rolled=rolled, attention=divided.heads, fused=fused)
