"""Attention flow (Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers", section 3).

Positions at the boundaries between blocks are the nodes of a network. What can flow from position j behind block l to
position i before it is at most

    0.5 mean_h p_ji + 0.5 [i = j],

attention with the skip connection, as in rollout. The score of a position is the largest flow that can go to it from
what the output looks at: from [CLS] or the last token, or from all positions, each of which then gives no more than its
share of the output. It is computed for each position by itself: flows to two of them may use the same edges, so that
scores do not add up to 1, and many may be at what their own edges let through. At least 0; of the class it knows no
more than where the output looks.

A flow is found by Dinic's algorithm in scipy, on whole numbers: capacities are multiplied by 2^30 and rounded, which
moves a score by at most 2^-31 times the edges of a cut. Cost: n_pos flows through n_layers n_pos^2 edges; half a second
for 64 tokens and 6 blocks, 3 s for 128 on one core, and so on with about the third power of the tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.errors import optional
from lig_lens.relevance.explained import Explained
from lig_lens.relevance.follow import identity
from lig_lens.relevance.method import Advance, Answer, Method

_WHOLE = 2.0**30


@dataclass(frozen=True)
class Flow(Method):
    """Attention flow; see the module. Edges of attention are the patterns.

    Attributes:
        every_layer: whether flows to positions before all blocks are computed, as `rolled`, not only before the first;
            costs about half as many times more as there are blocks.
    """

    name = "flow"

    every_layer: bool = False

    def explain(self, what: Explained, advance: Advance) -> Answer:
        """See the base class.

        Raises:
            MissingPackageError: scipy is not installed.
        """
        edges = what.patterns
        capacities = torch.stack([identity(block) for block in edges.mean(1)])
        readout = what.readout.to(edges)
        rows = range(len(edges) if self.every_layer else 1)
        rolled = torch.stack([largest_flows(capacities[row:], readout) for row in rows])
        return Answer(scores=rolled[0], rolled=rolled if self.every_layer else None, attention=edges)


def largest_flows(capacities: Float[Tensor, "layer src dst"], readout: Float[Tensor, "pos"]) -> Float[Tensor, "pos"]:
    """The largest flow from the output to each position before the first of some blocks.

    Args:
        capacities: of edges from destinations, behind a block, to sources before it.
        readout: of edges from the output to positions behind the last.

    Raises:
        MissingPackageError: scipy is not installed.
    """
    optional("scipy", "The method 'flow'")
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import maximum_flow

    n_layers, n_pos, _ = capacities.shape
    output = (n_layers + 1) * n_pos
    blocks = np.rint(capacities.detach().cpu().double().numpy() * _WHOLE).astype(np.int32)
    layer, src, dst = np.nonzero(blocks)
    above = np.rint(readout.detach().cpu().double().numpy() * _WHOLE).astype(np.int32)
    (read,) = np.nonzero(above)
    start = np.concatenate([(layer + 1) * n_pos + dst, np.full(len(read), output)])
    end = np.concatenate([layer * n_pos + src, n_layers * n_pos + read])
    size = np.concatenate([blocks[layer, src, dst], above[read]])
    network = csr_matrix((size, (start, end)), shape=(output + 1, output + 1))
    flows = [int(maximum_flow(network, output, pos).flow_value) for pos in range(n_pos)]
    return torch.tensor([flow / _WHOLE for flow in flows], dtype=capacities.dtype, device=capacities.device)
