"""What a block is, whatever prompt it runs on: made once per model and block."""

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from lig_lens.blocks.across import AcrossFormula
from lig_lens.blocks.formula import AttentionFormula
from lig_lens.blocks.layouts.layout import Layout
from lig_lens.blocks.reading import MESSAGE_PATHS


@dataclass(frozen=True)
class BlockBoundaries:
    """The nodes of one block, by TransformerLens hook name, as `describe_boundaries` returns them.

    `hook_z` is None where attention has no separable heads, `resid_mid` where no hook carries the sum of skip
    connection and attention output (parallel blocks have no such sum). `engine` is what `engine="auto"` takes for the
    `attn` and `block` maps: `closed_form`, or `hooks` for the reason in `why_hooks`.
    """

    layer: int
    layout: str
    resid_pre: str
    hook_z: str | None
    resid_mid: str | None
    resid_post: str
    n_heads: int
    n_key_value_heads: int
    d_head: int
    norms: tuple[str, ...]
    engine: str
    why_hooks: str = ""


@dataclass(frozen=True)
class AttentionNodes:
    """Where a block's attention shows its nodes, and what joins it to the rest of the block.

    Attributes:
        layout: how skip connection and attention output are joined.
        z_path: submodule whose output is the head outputs before W_O.
        attn_out_path: submodule whose output is the attention output, W_O z + b_O, before any norm on it.
        ends_there: whether what attention returns is that, with nothing done to it.
        b_O: its bias.
        missed: how far head outputs times W_O, with b_O, were from the attention output, relative.
        formula: of attention, or of cross-attention, if there is one; `BlockBoundaries.why_hooks` says why not.
        reads: hooks that `layout` needs for resid_mid.
    """

    layout: Layout
    z_path: str
    attn_out_path: str
    ends_there: bool
    b_O: Float[Tensor, "d_model"] = field(repr=False)
    missed: float
    formula: AttentionFormula | AcrossFormula | None
    reads: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """One block of a model. It holds nothing that keeps the model alive.

    Attributes:
        boundaries: its nodes by name, as users see them.
        eps: what its norms add to the mean square.
        rounding: its relative rounding error, larger than its dtype's where it casts to float32.
        norms_to_z: norms in a row on the way to the head outputs.
        tail_norms: hooks that show what the norms behind attention divide by.
        attention: its nodes, or None where attention has no separable heads.
        problem: why attention's nodes cannot be used although there are some.
        settled: whether another prompt would not show more: a formula that this one could not tell, say.
        found_on: number of different positions of the prompt on which all this was found.
    """

    boundaries: BlockBoundaries
    eps: float
    rounding: float
    norms_to_z: int
    tail_norms: tuple[str, ...]
    attention: AttentionNodes | None
    problem: str
    settled: bool
    found_on: int

    @property
    def norms_in_series(self) -> bool:
        """Whether the norms after attention see what passed those before it."""
        return self.attention is None or self.attention.layout.norms_in_series

    @property
    def reads(self) -> tuple[str, ...]:
        """Hooks that have to be read for a prompt's values."""
        paths = list(self.tail_norms)
        if self.attention is not None:
            nodes = self.attention
            paths += [nodes.z_path, nodes.attn_out_path, *nodes.reads]
            paths += nodes.formula.reads if nodes.formula is not None else MESSAGE_PATHS
        return tuple(dict.fromkeys(paths))
