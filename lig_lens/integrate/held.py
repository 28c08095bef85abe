"""Contributions to a metric of what attention moves alone: everything that bypasses the heads stays as in one run.

Along `x(a)`, the residual vectors that attention reads, from one run to another, z moves and the skip connection does
not, so

    dF/da = sum_{head, src, dst} <dF/dz_{dst, head}, (dz_{dst, head}/dx_src) dx_src>

adds up to the effect of patching the block's heads: of all of them in one cell, or of each by itself, the others'
outputs being held as well, in a cell for each head.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lig_lens.blocks.values import Values
from lig_lens.integrate.between import Between
from lig_lens.integrate.integrand import Budget
from lig_lens.integrate.onward import Downstream, Entry, Onward
from lig_lens.models.running import Hook, replacing, torch_hooks


@dataclass(frozen=True)
class Hold:
    """What stays while a path runs.

    Attributes:
        others: the other heads' outputs too, so that each head moves alone.
        noising: as in the run that the path ends in; else as in the one that it starts from.
    """

    others: bool
    noising: bool


class HeadsAlone(Onward):
    """One cell with the parts of all heads, sources and destinations; or one for each head."""

    # What moves is little, and not much more of it at the block before.
    guided = False

    def __init__(
        self, entry: Entry, values: Values, between: Between, down: Downstream, hold: Hold, budget: Budget
    ) -> None:
        n_pos, n_heads = values.heads.z.shape[:2]
        self.values, self.between = values, between
        self.n_groups = n_heads if hold.others else 1
        self.held = entry.path.end if hold.noising else entry.start
        with torch.no_grad():
            self.held_z = values.read_z(self.held[None])[0]
        super().__init__(entry, down, n_heads // self.n_groups * n_pos**2, budget)

    def outputs(self, resid: Float[Tensor, "item pos d_model"]) -> Float[Tensor, "item group *rest"]:
        """See the base class."""
        return self._onward(self._cells(self.values.read_z(resid)))

    def runs(self) -> Float[Tensor, "2 cell"]:
        """See the base class; in these runs nothing is held."""
        with torch.no_grad():
            return self._metric(super().outputs(torch.stack([self.first, self.entry.path.end])))

    def _cells(self, z: Float[Tensor, "item pos head d_head"]) -> Float[Tensor, "item group pos head d_head"]:
        """Head outputs in each cell: all that move, or one's and the others held."""
        if self.n_groups == 1:
            return z[:, None]
        own = torch.eye(self.n_groups, dtype=torch.bool, device=z.device)[:, None, :, None]
        return torch.where(own, z[:, None], self.held_z)

    def _onward(self, z: Float[Tensor, "item group pos head d_head"]) -> Float[Tensor, "item group *rest"]:
        """The model's outputs with head outputs in place of the block's own."""
        rows = z.flatten(0, 1)
        hooks: Mapping[str, Hook] = {self.values.heads.nodes.z_path: replacing(rows)}
        pairs = torch_hooks(self.values.call.modules, hooks)
        outputs = self.onward(self.held.expand(len(rows), -1, -1), pairs)
        return outputs.reshape(*z.shape[:2], *outputs.shape[1:])

    def _parts(
        self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"], groups: list[int]
    ) -> Float[Tensor, "item group part"]:
        """Parts `<x_i - x0_i, dF/dx_i>` at single points."""
        metric = self.down.metric
        with torch.enable_grad():
            resid = self.resid(a).requires_grad_()
            z = self.values.read_z(resid, self.between.hooks())
            leaf = self._cells(z)[:, groups].detach().requires_grad_()
            value = metric.checked(self._metric(self._onward(leaf)).flatten())
            (by_cells,) = torch.autograd.grad(value.sum(), leaf, materialize_grads=True)
        by_head = by_cells[:, 0]
        if self.n_groups > 1:  # of each cell its own head's
            by_head = torch.zeros_like(by_head)
            by_head[:, :, groups] = torch.stack([by_cells[:, i, :, head] for i, head in enumerate(groups)], 2)
        gradient = by_head.permute(2, 1, 0, 3)
        return self.between.contributions(a, resid, z, gradient).reshape(len(a), self.n_groups, -1)
