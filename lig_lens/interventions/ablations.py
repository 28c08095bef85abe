"""Ablations: all outputs of one head at a time are replaced by what it puts out on other prompts."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lig_lens.blocks.values import Values
from lig_lens.inputs.inputs import Inputs
from lig_lens.interventions.intervention import Change, Intervention, Trials, copies
from lig_lens.interventions.patches import whole_heads


class Ablation(Intervention):
    """What a head puts out on other prompts takes the place of what it puts out.

    Attributes:
        by: as users name it.
    """

    by: str
    on = "heads"
    done = "ablated"

    @property
    def name(self) -> str:
        """See the base class."""
        return f"{self.by} ablation"

    def settings(self, prompts: Sequence[Inputs]) -> dict[str, object]:
        """See the base class."""
        return super().settings(prompts) | {"by": self.by}


class Mean(Ablation):
    """The mean over the other prompts, position by position."""

    by = "mean"

    def trials(self, into: Values, others: Sequence[Values]) -> Trials:
        """See the base class."""
        return whole_heads(into.heads.z, torch.stack([other.heads.z for other in others]).mean(0))


class Resample(Ablation):
    """Each of the other prompts in turn; the metric is averaged."""

    by = "resample"

    def trials(self, into: Values, others: Sequence[Values]) -> Trials:
        """See the base class."""
        z, sources = into.heads.z, [other.heads.z for other in others]

        def make(numbers: Int[Tensor, "run"]) -> Change:
            changed, run = copies(z, numbers)
            head, other = numbers // len(sources), numbers % len(sources)
            # Picked one by one: all heads of all prompts in one tensor would be held at every block.
            put_in = [sources[n][:, h] for n, h in zip(other.tolist(), head.tolist(), strict=True)]
            changed[run, :, head] = torch.stack(put_in)
            return Change(z=changed)

        return _Averaged((z.shape[1], len(sources)), make)


class _Averaged(Trials):
    """Trials over whose last axis is averaged."""

    def arranged(self, found: Float[Tensor, "run"]) -> Float[Tensor, "head"]:
        """See the base class."""
        return super().arranged(found).mean(-1)
