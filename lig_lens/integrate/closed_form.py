"""The fast engine: attention in closed form, the rest of the block by one backward pass for all destinations.

It gives what `hooks` gives, for blocks whose attention has a `Formula`: sources, heads and destinations together,
instead of one backward pass for each destination and head.
"""

from abc import abstractmethod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lig_lens.blocks.find import BlockNodes
from lig_lens.blocks.tail import Tail
from lig_lens.integrate import integrand as common
from lig_lens.integrate.attention import AttentionPath, OwnPaths, Panels, SharedPath
from lig_lens.integrate.integrand import Budget, PathIntegrand
from lig_lens.integrate.quadrature import Integral
from lig_lens.paths.baselines import ResidPath
from lig_lens.targets.targets import Direction, Scalar

# Numbers in one attention-shaped tensor, for each token that may be run through a block at once: large enough to
# make the cost of calls small, small enough for such tensors to stay in a CPU's cache.
NUMBERS_PER_TOKEN = 64


class _FromResid(PathIntegrand):
    """What both maps share: the path of attention, and how work on it is portioned."""

    def __init__(
        self, nodes: BlockNodes, path: ResidPath, scalar: Scalar, dst: Int[Tensor, "dst"], n_groups: int, size: int
    ) -> None:
        super().__init__(nodes, scalar, dst, n_groups, n_parts=len(nodes.resid_pre))
        formula = nodes.formula
        assert formula is not None and nodes.W_O is not None
        self.path, self.size = path, size
        if path.start is None:
            self.attention: AttentionPath = OwnPaths(formula, dst)
        else:
            self.attention = SharedPath(formula, dst, formula.tokens(path.start))
        self.groups = torch.arange(n_groups, device=self.device)[:, None]

    @abstractmethod
    def _scalars(self, panels: Panels, displacement: Tensor) -> Tensor:
        """Scalars [panel group] at panels of one node, where z has moved by `displacement`."""

    @abstractmethod
    def _values(self, panels: Panels) -> Tensor:
        """Parts at the points of `panels`: [group panel node src]."""

    def scalars(self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"]) -> Float[Tensor, "item group"]:
        """See `quadrature.Integrand`."""
        result = torch.zeros(len(dst), self.n_groups, dtype=self.dtype, device=self.device)
        for panels in self.attention.work(dst, a[:, None], None, self.size):
            result[panels.rows[0]] = self._scalars(panels, self.attention.move(panels))
        return result

    def sums(
        self,
        dst: Int[Tensor, "panel"],
        a: Float[Tensor, "panel node"],
        factors: Float[Tensor, "panel node column"],
        groups: Bool[Tensor, "panel group"],
    ) -> Float[Tensor, "column panel group part"]:
        """See `quadrature.Integrand`."""
        shape = (factors.shape[2], len(dst), self.n_groups, self.n_parts)
        result = torch.zeros(shape, dtype=self.dtype, device=self.device)
        factors = factors.to(self.dtype).to(self.device).mT
        for panels in self.attention.work(dst, a, groups, self.size):
            columns = factors[panels.rows] @ self._values(panels)  # group panel column src
            result[:, panels.rows, self.groups, : panels.n_src] = columns.permute(2, 0, 1, 3)
        return result


class _ToHeads(_FromResid):
    """resid_pre -> hook_z: groups are heads."""

    def __init__(self, nodes: BlockNodes, path: ResidPath, scalar: Scalar, dst: Int[Tensor, "dst"], size: int) -> None:
        super().__init__(nodes, path, scalar, dst, nodes.boundaries.n_heads, size)
        self.start = self.attention.z_start.transpose(0, 1)

    def _scalars(self, panels: Panels, displacement: Tensor) -> Tensor:
        return self.scalar(displacement[:, :, 0].transpose(0, 1), panels.dst[0])

    def _values(self, panels: Panels) -> Tensor:
        displacement = self.attention.move(panels)
        gradient = self.scalar.gradient(displacement, panels.dst)
        return self.attention.contributions(panels, displacement, gradient)


class _ToBlock(_FromResid):
    """resid_pre -> resid_post: one group; heads and the skip connection add up."""

    def __init__(self, nodes: BlockNodes, path: ResidPath, scalar: Scalar, dst: Int[Tensor, "dst"], size: int) -> None:
        # The tail runs on rows of the prompt's length, so at least one such row is worked on at a time.
        n_pos = len(nodes.resid_pre)
        super().__init__(nodes, path, scalar, dst, 1, max(size, nodes.boundaries.n_heads * n_pos**2))
        self.attn_out_start = nodes.attn_out(self.attention.z_start.transpose(0, 1), 1.0)
        self.skip_start = (path.end if path.start is None else path.start)[dst]
        self.skip_step = path.end[dst] - self.skip_start
        self.tail = Tail(nodes, self.attn_out_start, self.skip_start)
        self.start = self.tail.out[:, None]

    def _tail(self, panels: Panels, displacement: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """What the tail gets, as leaves: [item d_model] each, and the scalars: [item 1]."""
        assert self.nodes.W_O is not None
        n_nodes = panels.a.shape[-1]
        own, dst = (index[0].repeat_interleave(n_nodes) for index in (panels.own, panels.dst))
        moved = torch.einsum("hpne,hem->pnm", displacement, self.nodes.W_O).flatten(0, 1)
        leaves = (
            self.attn_out_start[own] + moved,
            torch.addcmul(self.skip_start[own], panels.a.reshape(-1, 1), self.skip_step[own]),
        )
        for leaf in leaves:
            leaf.requires_grad_(torch.is_grad_enabled())
        out = self.tail(*leaves)[:, None]
        return leaves, self.scalar(out - self.start[own], dst)

    def _scalars(self, panels: Panels, displacement: Tensor) -> Tensor:
        return self._tail(panels, displacement)[1]

    def _values(self, panels: Panels) -> Tensor:
        displacement = self.attention.move(panels)
        with torch.enable_grad():
            leaves, value = self._tail(panels, displacement)
            by_attn_out, by_skip = torch.autograd.grad(value.sum(), leaves)
        assert self.nodes.W_O is not None
        shape = panels.a.shape[1:]
        gradient = torch.einsum("im,hem->hie", by_attn_out, self.nodes.W_O)
        gradient = gradient.reshape(len(gradient), *shape, -1)
        result = self.attention.contributions(panels, displacement, gradient).sum(0, keepdim=True)
        if self.path.start is not None:
            step = self.skip_step[panels.own[0]][:, None]
            by_own = (by_skip.reshape(*shape, -1) * step).sum(-1)[..., None]
            result.scatter_add_(-1, panels.dst[..., None, None].expand(1, *shape, 1), by_own[None])
        return result


def integrate_resid(
    nodes: BlockNodes,
    path: ResidPath,
    target: "str | Direction",
    dst: Int[Tensor, "dst"],
    to_heads: bool,
    budget: Budget,
) -> Integral:
    """Contributions of source tokens to head outputs (`attn` map) or to the block's output (`block` map).

    Same arguments and result as `hooks.integrate_resid`; `nodes` must have a formula.

    Returns:
        parts [dst, head or 1, src].
    """
    with torch.no_grad():
        scalar = Scalar(target, len(nodes.resid_pre), nodes.resid_pre, nodes.W_O if to_heads else None)
        size = NUMBERS_PER_TOKEN * budget.max_batch_tokens
        if to_heads:
            return common.integrate_resid(_ToHeads(nodes, path, scalar, dst, size), path, None, dst, budget)
        integrand = _ToBlock(nodes, path, scalar, dst, size)
        return common.integrate_resid(integrand, path, integrand.tail.scales, dst, budget)
