"""How a block joins skip connection and attention output.

Layouts in which the rest of a block sees only the sum of both (`SumLayout`) are told apart by where the first norm
stands, once one run has shown that they are of that kind; the others by `fits`, on what more runs have shown.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from lig_lens.blocks.inside import ALLOWED, Inside, by_position
from lig_lens.models.running import Hook


@dataclass(frozen=True)
class Trial:
    """What a block put out when its nodes were changed; see `layout_fit.diagnose`.

    Attributes:
        inside: the block's nodes on the prompt.
        b_O: bias of the attention output.
        vector: what is moved.
        moved: output with a vector moved from the attention output to the skip connection.
        without_z: output with all head outputs 0.
    """

    inside: Inside
    b_O: Float[Tensor, "d_model"]
    vector: Float[Tensor, "pos d_model"] = field(repr=False)
    moved: Float[Tensor, "pos d_model"] = field(repr=False)
    without_z: Float[Tensor, "pos d_model"] = field(repr=False)

    @property
    def output(self) -> Float[Tensor, "pos d_model"]:
        """The block's output on the prompt."""
        return self.inside.seen.output

    def moved_scaled(self, scale: Float[Tensor, "..."]) -> Float[Tensor, "pos d_model"]:
        """Output with the vector added to the skip connection, and 1 / scale of it taken from the attention output."""
        inside = self.inside
        hooks: dict[str, Hook] = {
            inside.z_path: lambda now: inside.z.reshape(now.shape),  # what enters attention moves too
            inside.attn_out_path: lambda now: now - self.vector / scale,
        }
        return inside.call.run((inside.call.resid_pre + self.vector)[None], hooks)[0]

    def same(self, output: Float[Tensor, "pos d_model"]) -> bool:
        """Whether an output is that of the prompt."""
        return by_position(output - self.output, self.output) <= ALLOWED


class Layout(ABC):
    """One way of joining them. A new one is a file here, and a line in `layouts/__init__.py`.

    Attributes:
        name: as `describe_boundaries` shows it.
        norms_in_series: the norms after attention see what passed the one before it; in parallel layouts they see what
            that one sees.
    """

    name: str
    norms_in_series = True

    @abstractmethod
    def fits(self, trial: Trial) -> bool:
        """Whether the block does what it would do in this layout."""

    def middle(self, inside: Inside) -> Float[Tensor, "pos d_model"] | None:
        """The vector that the rest of the block sees, resid_mid, where the layout has one."""
        return None

    def reads(self, inside: Inside) -> tuple[str, ...]:
        """Hooks that `middle` needs beside the attention output."""
        return ()


class SumLayout(Layout):
    """The rest of the block sees skip connection and attention output as their sum only."""

    def fits(self, trial: Trial) -> bool:
        """See the base class."""
        return trial.same(trial.moved) and self.places_norm(trial.inside)

    @abstractmethod
    def places_norm(self, inside: Inside) -> bool:
        """Whether the block's first norm is where this layout has it."""

    def middle(self, inside: Inside) -> Float[Tensor, "pos d_model"] | None:
        """The sum."""
        return inside.call.resid_pre + inside.attn_out
