"""What one prompt puts at a block's nodes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lig_lens.blocks.across import AcrossValues
from lig_lens.blocks.block import AttentionNodes, Block
from lig_lens.blocks.call import BlockCall
from lig_lens.blocks.formula import FormulaValues
from lig_lens.errors import BoundaryError
from lig_lens.models.running import Hook


@dataclass(frozen=True)
class Messages:
    """Pattern and values of attention, `z = pattern @ values` head by head: what a source sends is `p_ji v_i`.

    Rows of a pattern add up to 1, but for what a sink takes.
    """

    pattern: Float[Tensor, "head dst src"] = field(repr=False)
    values: Float[Tensor, "src head d_head"] = field(repr=False)
    v_path: str
    """The hook that shows the values."""


@dataclass(frozen=True)
class HeadValues:
    """A prompt's values at attention's nodes.

    Attributes:
        nodes: where they are.
        z: head outputs before W_O.
        W_O: the model's own, in the dtype of integration.
        pattern: of attention, if a hook shows it.
        resid_mid: what the rest of the block sees, where the layout has it.
        formula: of attention, or of cross-attention, with the prompt's values, if there is one.
        v_path: the hook that shows values, if somebody asked for it and pattern times values gives z.
        messages: pattern and values themselves, if somebody asked for them.
    """

    nodes: AttentionNodes
    z: Float[Tensor, "pos head d_head"] = field(repr=False)
    W_O: Float[Tensor, "head d_head d_model"] = field(repr=False)
    pattern: Float[Tensor, "head dst src"] | None = field(default=None, repr=False)
    resid_mid: Float[Tensor, "pos d_model"] | None = field(default=None, repr=False)
    formula: FormulaValues | AcrossValues | None = field(default=None, repr=False)
    v_path: str | None = None
    messages: Messages | None = field(default=None, repr=False)

    @property
    def n_heads(self) -> int:
        """Number of query heads."""
        return self.z.shape[1]

    @property
    def closed(self) -> FormulaValues:
        """The formula of attention within one stack.

        Raises:
            BoundaryError: there is none.
        """
        if not isinstance(self.formula, FormulaValues):
            raise BoundaryError("This block's attention has no formula: use engine='hooks'.")
        return self.formula

    def attn_out(self, z: Float[Tensor, "*batch head d_head"], bias: float) -> Float[Tensor, "*batch d_model"]:
        """Attention output of head outputs `z`, with `bias` times b_O."""
        return torch.einsum("...he,hem->...m", z, self.W_O) + bias * self.nodes.b_O


@dataclass(frozen=True)
class Values:
    """One prompt's values at one block.

    Attributes:
        block: what the block is.
        call: how it was called; holds resid_pre.
        resid_post: in the dtype of integration, replayed if the model is not.
        tail_scales: what the norms behind attention divide by (path of the hook -> value).
        attention: values at attention's nodes, where the block has them.
    """

    block: Block
    call: BlockCall
    resid_post: Float[Tensor, "pos d_model"] = field(repr=False)
    tail_scales: Mapping[str, Float[Tensor, "pos"]] = field(repr=False)
    attention: HeadValues | None = None

    def __len__(self) -> int:
        return len(self.resid_pre)

    @property
    def layer(self) -> int:
        """Index of the block in the model."""
        return self.call.layer

    @property
    def resid_pre(self) -> Float[Tensor, "pos d_model"]:
        """Residual vectors that entered the block, or what entered it from another stack (see `BlockCall`)."""
        return self.call.resid_pre

    @property
    def heads(self) -> HeadValues:
        """Values at attention's nodes.

        Raises:
            BoundaryError: the block has none.
        """
        if self.attention is None:
            raise BoundaryError(f"Block {self.layer} has no attention with separable heads: leave the layer out.")
        return self.attention

    def read_z(
        self, resid_pre: Float[Tensor, "batch src d_model"], hooks: Mapping[str, Hook] | None = None
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Head outputs (before W_O) for given residual vectors; the rest of the block runs for other hooks alone."""
        path, read = self.heads.nodes.z_path, list[Tensor]()
        if hooks:  # some bridges show the pattern behind the head outputs
            self.call.run(resid_pre, {path: read.append, **hooks})
        else:
            self.call.read(resid_pre, {path: read.append}, stop_at=path)
        return read[0].reshape(*read[0].shape[:2], *self.heads.z.shape[1:])

    def run_tail(
        self,
        attn_out: Float[Tensor, "batch pos d_model"],
        skip: Float[Tensor, "batch pos d_model"],
        hooks: Mapping[str, Hook] | None = None,
        positions: Int[Tensor, "item"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """resid_post from the attention output (W_O z + b_O, before any norm on it) and the skip connection."""
        return self.call.run(skip, {**(hooks or {}), self.heads.nodes.attn_out_path: lambda _: attn_out}, positions)
