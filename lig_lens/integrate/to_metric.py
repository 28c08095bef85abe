"""Contributions to a metric: the path runs through one block's attention, and the rest of the model runs along.

Along `x(a)`, the residual vectors from one run to another, with z and skip the two ways on from x,

    dF/da = sum_src <dx_src, dF/dskip_src> + sum_{head, dst, src} <dF/dz_{dst, head}, (dz_{dst, head}/dx_src) dx_src>

so one forward and backward pass of the rest of the model for all destinations at once gives the gradients at z and at
the skip connection, and what lies between x and z is attention's formula, or autograd where it has none. With
`split="message"` the second sum goes over messages instead, `z_{dst, head} = sum_src p_{dst, src} v_src`: its terms are
`<dF/dz_{dst, head}, d(p_{dst, src} v_src)/da>`.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lig_lens.blocks.values import Values
from lig_lens.integrate.between import Between
from lig_lens.integrate.held import HeadsAlone, Hold
from lig_lens.integrate.integrand import Budget
from lig_lens.integrate.onward import Downstream, Entry, Onward, entry_of
from lig_lens.integrate.quadrature import Integral
from lig_lens.models.running import Hook, torch_hooks
from lig_lens.paths.path import ResidPath


@dataclass
class _Cut:
    """Head outputs on both sides of a cut: as the block made them, and as the rest of it gets them."""

    before: list[Tensor] = field(default_factory=list)
    after: list[Tensor] = field(default_factory=list)

    def __call__(self, z: Tensor) -> Tensor:
        leaf = z.detach().requires_grad_()
        self.before.append(z)
        self.after.append(leaf)
        return leaf


class _ThroughHeads(Onward):
    """One cell: parts are all heads, sources and destinations, then what of each source bypasses the heads."""

    def __init__(self, entry: Entry, values: Values, between: Between, down: Downstream, budget: Budget) -> None:
        n_pos, n_heads = values.heads.z.shape[:2]
        super().__init__(entry, down, n_heads * n_pos**2 + n_pos, budget)
        self.values, self.between = values, between
        self.shape = (n_heads, n_pos, n_pos)

    def _parts(
        self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"], groups: list[int]
    ) -> Float[Tensor, "item group part"]:
        """Parts `<x_i - x0_i, dF/dx_i>` at single points."""
        cut = _Cut()
        hooks: dict[str, Hook] = {self.values.heads.nodes.z_path: cut, **self.between.hooks()}
        with torch.enable_grad():
            resid = self.resid(a).requires_grad_()
            value = self.value(resid, torch_hooks(self.values.call.modules, hooks))
            ends = (cut.after[0], resid)
            # A metric may depend on positions that what comes later does not reach.
            by_z, by_skip = torch.autograd.grad(value.sum(), ends, materialize_grads=True, retain_graph=True)
        n_heads, n_pos = self.shape[:2]
        gradient = by_z.reshape(len(a), n_pos, n_heads, -1).permute(2, 1, 0, 3)  # head dst item d_head
        heads = self.between.contributions(a, resid, cut.before[0], gradient)
        return torch.cat([heads.flatten(1), (by_skip * self.step).sum(-1)], -1)[:, None]


def metric_integral(
    values: Values,
    path: ResidPath,
    between: Between,
    down: Downstream,
    known: float | None,
    hold: Hold | None,
    budget: Budget,
) -> tuple[Float[Tensor, "head src dst"], Float[Tensor, "src"], Integral]:
    """Contributions to a metric through one block's heads and past them.

    Args:
        values: of the clean prompt at the block.
        path: shared by all destinations.
        between: what lies between residual vectors and head outputs.
        down: the model from the block on.
        known: the metric in the run that the path starts from, if that is one of the model's.
        hold: what stays while the path runs, if anything does.
        budget: how hard to try.

    Returns:
        what each source contributes through each head to each destination, what it contributes past the heads (nothing
        where that is held), and the integral that both are parts of, of one cell, or of one for each head.

    Raises:
        BoundaryError: the model gives something else when it is run from the block on.
    """
    entry, (n_pos, n_heads) = entry_of(values, path), values.heads.z.shape[:2]
    if hold is None:
        integral = _ThroughHeads(entry, values, between, down, budget).integrate((known, down.clean), budget)
        parts, skip = torch.split(integral.parts[0, 0], [n_heads * n_pos**2, n_pos])
    else:
        alone = HeadsAlone(entry, values, between, down, hold, budget)
        integral = alone.integrate((known, down.clean), budget)
        parts, skip = integral.parts[0], entry.start.new_zeros(n_pos)
    return parts.reshape(n_heads, n_pos, n_pos), skip, integral
