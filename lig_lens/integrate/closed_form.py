"""Integrands with attention in closed form, the rest of the block by one backward pass for all destinations.

They give what `autograd.py` gives, for blocks whose attention has a formula: sources, heads and destinations together,
instead of one backward pass for each destination and head.
"""

import functools
from abc import abstractmethod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lig_lens.blocks.tail import Tail
from lig_lens.blocks.values import Values
from lig_lens.integrate.attention_path import AttentionPath, Moved, OwnPaths, SharedPath
from lig_lens.integrate.integrand import Budget, PathIntegrand
from lig_lens.models.switches import Switches
from lig_lens.paths.path import ResidPath
from lig_lens.targets.target import DestinationTarget, Scalar

# Numbers in one attention-shaped tensor, for each token that may be run through a block at once: large enough to
# make the cost of calls small, small enough for such tensors to stay in a CPU's cache.
NUMBERS_PER_TOKEN = 64


class _FromResid(PathIntegrand):
    """What both maps share: the path of attention, and how work on it is portioned."""

    def __init__(
        self, values: Values, path: ResidPath, scalar: Scalar, dst: Int[Tensor, "dst"], n_groups: int, size: int
    ) -> None:
        super().__init__(values, scalar, dst, n_groups, n_parts=len(values))
        self.path, self.size = path, size
        self.chunk = max(1, size // (values.heads.n_heads * len(values)))
        formula = values.heads.closed
        if path.start is None:
            self.attention: AttentionPath = OwnPaths(formula, dst)
        else:
            self.attention = SharedPath(formula, dst, formula.tokens(path.start))
        self.groups = torch.arange(n_groups, device=self.device)[:, None]

    @abstractmethod
    def _scalars(self, moved: Moved) -> Float[Tensor, "panel group"]:
        """Scalars at panels of one node, where attention has moved."""

    @abstractmethod
    def _values(self, moved: Moved) -> Float[Tensor, "group panel node src"]:
        """Parts where attention has moved."""

    @torch.no_grad()
    def scalars(self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"]) -> Float[Tensor, "item group"]:
        """See `split.Integrand`."""
        result = torch.zeros(len(dst), self.n_groups, dtype=self.dtype, device=self.device)
        for panels in self.attention.work(dst, a[:, None], None, self.size):
            result[panels.rows[0]] = self._scalars(self.attention.move(panels))
        return result

    @torch.no_grad()
    def sums(
        self,
        dst: Int[Tensor, "panel"],
        a: Float[Tensor, "panel node"],
        factors: Float[Tensor, "panel node column"],
        groups: Bool[Tensor, "panel group"],
    ) -> Float[Tensor, "column panel group part"]:
        """See `split.Integrand`."""
        shape = (factors.shape[2], len(dst), self.n_groups, self.n_parts)
        result = torch.zeros(shape, dtype=self.dtype, device=self.device)
        factors = factors.to(self.dtype).to(self.device).mT
        for panels in self.attention.work(dst, a, groups, self.size):
            columns = factors[panels.rows] @ self._values(self.attention.move(panels))  # group panel column src
            result[:, panels.rows, self.groups, : panels.n_src] = columns.permute(2, 0, 1, 3)
        return result

    def switches(self) -> bool:
        """See `split.Integrand`; attention itself does not, or it would have no formula."""
        return False

    def margins(self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"]) -> Float[Tensor, "item unit"]:
        """See `split.Integrand`."""
        return torch.zeros(len(dst), 0)


class _ToHeads(_FromResid):
    """resid_pre -> hook_z: groups are heads."""

    all_norms_known = True

    def __init__(self, values: Values, path: ResidPath, scalar: Scalar, dst: Int[Tensor, "dst"], size: int) -> None:
        super().__init__(values, path, scalar, dst, values.heads.n_heads, size)
        self.start = self.attention.z_start.transpose(0, 1)

    def _scalars(self, moved: Moved) -> Float[Tensor, "panel group"]:
        return self.scalar(moved.displacement[:, :, 0].transpose(0, 1), moved.panels.dst[0])

    def _values(self, moved: Moved) -> Float[Tensor, "group panel node src"]:
        return moved.contributions(self.scalar.gradient(moved.displacement, moved.panels.dst))


class _ToBlock(_FromResid):
    """resid_pre -> resid_post: one group; heads and the skip connection add up."""

    def __init__(self, values: Values, path: ResidPath, scalar: Scalar, dst: Int[Tensor, "dst"], size: int) -> None:
        # The tail runs on rows of the prompt's length, so at least one such row is worked on at a time.
        super().__init__(values, path, scalar, dst, 1, max(size, values.heads.n_heads * len(values) ** 2))
        self.attn_out_start = values.heads.attn_out(self.attention.z_start.transpose(0, 1), 1.0)
        self.skip_start = (path.end if path.start is None else path.start)[dst]
        self.skip_step = path.end[dst] - self.skip_start
        self.tail = Tail(values, self.attn_out_start, self.skip_start, dst)
        self.start, self.scales = self.tail.out[:, None], self.tail.scales

    def _leaves(self, moved: Moved) -> tuple[Tensor, Tensor]:
        """What the tail gets: [item d_model] each."""
        panels = moved.panels
        own = panels.own[0].repeat_interleave(panels.a.shape[-1])
        attn_out = torch.einsum("hpne,hem->pnm", moved.displacement, self.values.heads.W_O).flatten(0, 1)
        return (
            self.attn_out_start[own] + attn_out,
            torch.addcmul(self.skip_start[own], panels.a.reshape(-1, 1), self.skip_step[own]),
        )

    def _tail(self, moved: Moved) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """What the tail gets, as leaves, and the scalars: [item 1]."""
        panels, leaves = moved.panels, self._leaves(moved)
        own, dst = (index[0].repeat_interleave(panels.a.shape[-1]) for index in (panels.own, panels.dst))
        for leaf in leaves:
            leaf.requires_grad_(torch.is_grad_enabled())
        out = self.tail(*leaves, dst)[:, None]
        return leaves, self.scalar(out - self.start[own], dst)

    def _scalars(self, moved: Moved) -> Float[Tensor, "panel group"]:
        return self._tail(moved)[1]

    def _values(self, moved: Moved) -> Float[Tensor, "group panel node src"]:
        panels = moved.panels
        with torch.enable_grad():
            leaves, value = self._tail(moved)
            by_attn_out, by_skip = torch.autograd.grad(value.sum(), leaves)
        shape = panels.a.shape[1:]
        gradient = torch.einsum("im,hem->hie", by_attn_out, self.values.heads.W_O)
        gradient = gradient.reshape(len(gradient), *shape, -1)
        result = moved.contributions(gradient).sum(0, keepdim=True)
        if self.path.start is not None:
            step = self.skip_step[panels.own[0]][:, None]
            by_own = (by_skip.reshape(*shape, -1) * step).sum(-1)[..., None]
            result.scatter_add_(-1, panels.dst[..., None, None].expand(1, *shape, 1), by_own[None])
        return result

    def switches(self) -> bool:
        """See `split.Integrand`; here it is the tail that may."""
        return bool(self._switches)

    @functools.cached_property
    def _switches(self) -> Switches:
        def run(n: int) -> None:
            dst = self.attention.dst[:1].expand(n)
            attn_out, skip = (one[:1].expand(n, -1) for one in (self.attn_out_start, self.skip_start))
            self.tail(attn_out, skip, dst)

        return Switches(run, len(self.values))

    @torch.no_grad()
    def margins(self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"]) -> Float[Tensor, "item unit"]:
        """See `split.Integrand`."""
        attn_out, skip = (one.new_zeros(len(dst), one.shape[-1]) for one in (self.attn_out_start, self.skip_start))
        for panels in self.attention.work(dst, a[:, None], None, self.size):
            rows = panels.rows[0]
            attn_out[rows], skip[rows] = self._leaves(self.attention.move(panels))
        positions = self.attention.dst[dst.to(self.device)]
        return self._switches.margins(len(dst), lambda: self.tail(attn_out, skip, positions))


def resid_integrand(
    values: Values,
    path: ResidPath,
    target: DestinationTarget,
    dst: Int[Tensor, "dst"],
    to_heads: bool,
    budget: Budget,
) -> PathIntegrand:
    """Contributions of source tokens to head outputs (`attn` map) or to the block's output (`block` map).

    Same arguments and parts as in `autograd.py`; the block's attention must have a formula.
    """
    scalar = target.at_node(len(values), values.resid_pre, values.heads.W_O if to_heads else None)
    kind = _ToHeads if to_heads else _ToBlock
    with torch.no_grad():
        return kind(values, path, scalar, dst, NUMBERS_PER_TOKEN * budget.max_batch_tokens)
