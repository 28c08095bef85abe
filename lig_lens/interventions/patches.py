"""Activation patching: one node at a time gets its value from the other run."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from lig_lens.blocks.known import Needs
from lig_lens.blocks.values import Values
from lig_lens.errors import InputError
from lig_lens.inputs.inputs import Inputs
from lig_lens.interventions.intervention import Change, Intervention, Trials, copies


@dataclass(frozen=True)
class Patch(Intervention):
    """One node at a time gets its value from the other of two runs.

    Attributes:
        noising: corrupted values are put into the clean run; otherwise clean ones into the corrupted run.
        node: as users name it.
        shown: the node in words.
    """

    noising: bool = False
    node: ClassVar[str]
    shown: ClassVar[str]
    on = "positions"
    done = "patched"

    @property
    def name(self) -> str:
        """See the base class."""
        return f"activation patching of {self.shown}" + (", noising" if self.noising else "")

    @property
    def doing(self) -> str:
        """See the base class."""
        return f"patching {self.node}"

    @property
    def denoises(self) -> bool:
        """See the base class."""
        return not self.noising

    def settings(self, prompts: Sequence[Inputs]) -> dict[str, object]:
        """See the base class."""
        clean, corrupted = prompts
        return {"clean": clean.record(), "corrupted": corrupted.record(), "at": self.node, "noising": self.noising}

    def trials(self, into: Values, others: Sequence[Values]) -> Trials:
        """See the base class."""
        (source,) = others
        return self.from_source(into, source)

    @abstractmethod
    def from_source(self, into: Values, source: Values) -> Trials:
        """The runs at one block, given its values in the run that is changed and in the other one."""

    def everywhere(self) -> "Patch":
        """The same node at all positions at once.

        Raises:
            InputError: that would be all of the other run.
        """
        raise InputError(
            f"each_position=False goes with at='hook_z': {self.node} at all positions is all of the other run."
        )


@dataclass(frozen=True)
class HookZ(Patch):
    """One head's output at one position."""

    node = "hook_z"
    shown = "head outputs (hook_z)"
    on = "heads_by_pos"

    def from_source(self, into: Values, source: Values) -> Trials:
        """See the base class."""
        z, other = into.heads.z, source.heads.z
        n_pos, n_heads = z.shape[:2]

        def make(numbers: Int[Tensor, "run"]) -> Change:
            patched, run = copies(z, numbers)
            head, pos = numbers // n_pos, numbers % n_pos
            patched[run, pos, head] = other[pos, head]
            return Change(z=patched)

        return Trials((n_heads, n_pos), make)

    def everywhere(self) -> Patch:
        """See the base class."""
        return WholeHeads(self.noising)


@dataclass(frozen=True)
class WholeHeads(HookZ):
    """All outputs of one head."""

    on = "heads"

    def from_source(self, into: Values, source: Values) -> Trials:
        """See the base class."""
        return whole_heads(into.heads.z, source.heads.z)


def whole_heads(z: Float[Tensor, "pos head d_head"], other: Float[Tensor, "pos head d_head"]) -> Trials:
    """Runs in which all outputs of one head at a time are replaced.

    Args:
        z: head outputs in the run that is changed.
        other: what is put in.
    """

    def make(numbers: Int[Tensor, "run"]) -> Change:
        changed, run = copies(z, numbers)
        changed[run, :, numbers] = other[:, numbers].transpose(0, 1)
        return Change(z=changed)

    return Trials((z.shape[1],), make)


@dataclass(frozen=True)
class ResidPre(Patch):
    """The residual stream at one position, before a block."""

    node = shown = "resid_pre"

    def from_source(self, into: Values, source: Values) -> Trials:
        """See the base class."""

        def make(numbers: Int[Tensor, "run"]) -> Change:
            patched, run = copies(into.resid_pre, numbers)
            patched[run, numbers] = source.resid_pre[numbers]
            return Change(resid=patched)

        return Trials((len(into),), make)


@dataclass(frozen=True)
class ResidMid(Patch):
    """The residual stream at one position, between attention and the rest of a block."""

    node = shown = "resid_mid"
    needs = Needs(formula=False, middle=True)

    def from_source(self, into: Values, source: Values) -> Trials:
        """See the base class."""
        z, step = into.heads.z, _middle(source) - _middle(into)

        def make(numbers: Int[Tensor, "run"]) -> Change:
            # The rest of the block sees only the sum: what is added to one of its terms is added to it.
            patched, run = copies(into.resid_pre, numbers)
            patched[run, numbers] += step[numbers]
            return Change(resid=patched, z=z.expand(len(numbers), -1, -1, -1))

        return Trials((len(into),), make)


def _middle(values: Values) -> Float[Tensor, "pos d_model"]:
    middle = values.heads.resid_mid
    if middle is None:
        raise InputError(
            f"Block {values.layer} ({values.block.boundaries.layout}) has no resid_mid to patch: use at='resid_pre' or "
            "'hook_z'."
        )
    return middle
