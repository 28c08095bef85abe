"""Contributions to a metric: the path runs through one block's attention, and the rest of the model runs along.

Along `x(a)`, the residual vectors from one run to another, with z and skip the two ways on from x,

    dF/da = sum_src <dx_src, dF/dskip_src> + sum_{head, dst, src} <dF/dz_{dst, head}, (dz_{dst, head}/dx_src) dx_src>

so one forward and backward pass of the rest of the model for all destinations at once gives the gradients at z and at
the skip connection, and what lies between x and z is attention's formula, or autograd where it has none. With
`split="message"` the second sum goes over messages instead, `z_{dst, head} = sum_src p_{dst, src} v_src`: its terms are
`<dF/dz_{dst, head}, d(p_{dst, src} v_src)/da>`.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lig_lens.blocks.call import Hook
from lig_lens.blocks.find import BlockNodes
from lig_lens.blocks.formula import PATTERN_PATH
from lig_lens.blocks.messages import by_head
from lig_lens.errors import BoundaryError
from lig_lens.integrate.attention import SharedPath
from lig_lens.integrate.closed_form import NUMBERS_PER_TOKEN
from lig_lens.integrate.integrand import Budget, layers_of_paths
from lig_lens.integrate.quadrature import Integral, integrate
from lig_lens.models.stack import Rest
from lig_lens.paths.baselines import ResidPath
from lig_lens.targets.metrics import BatchMetric


class _ToMetric:
    """One cell: parts are all heads, sources and destinations, then what of each source bypasses the heads."""

    n_dst, n_groups = 1, 1

    def __init__(
        self,
        nodes: BlockNodes,
        path: ResidPath,
        rest: Rest,
        metric: BatchMetric,
        known: tuple[float | None, float],
        budget: Budget,
        closed: bool,
        split: str,
    ) -> None:
        assert path.start is not None and nodes.z_path is not None and nodes.z is not None
        self.nodes, self.path, self.rest, self.metric, self.split = nodes, path, rest, metric, split
        self.dtype, self.device = path.end.dtype, path.end.device
        self.step = path.end - path.start
        n_pos, n_heads = nodes.z.shape[:2]
        self.shape = (n_heads, n_pos, n_pos)
        self.n_parts = n_heads * n_pos**2 + n_pos
        # Every block that is still to run keeps activations for the backward pass.
        self.chunk = max(1, budget.max_batch_tokens // (n_pos * (len(rest.model.blocks) - nodes.layer)))
        self.size = NUMBERS_PER_TOKEN * budget.max_batch_tokens
        self.attention = None
        if closed:
            assert nodes.formula is not None
            dst = torch.arange(n_pos, device=self.device)
            self.attention = SharedPath(nodes.formula, dst, nodes.formula.tokens(path.start))
        logits = self.rest(nodes.call, torch.stack([path.start, path.end]))
        ends = metric(logits).to(self.dtype)
        self.start = ends[:1]
        self.sensitivity = max(metric.sensitivity(one[None]) for one in logits)
        self._check(ends.tolist(), known)

    def _check(self, ends: list[float], known: tuple[float | None, float]) -> None:
        """Verify that the path starts and ends in the model's own runs."""
        for here, whole in zip(ends, known, strict=True):
            missed = 0.0 if whole is None else abs(here - whole) / max(self.sensitivity, 1e-30)
            if not missed <= 1e-4:
                raise BoundaryError(
                    f"Running the model from block {self.nodes.layer} on gives a metric of {here:.6g} where the whole "
                    f"model gives {whole:.6g}: something else than the residual stream passes between its blocks, or "
                    "the model is random. No metric can be attributed there."
                )

    def _resid(self, a: Float[Tensor, "item"]) -> Float[Tensor, "item pos d_model"]:
        assert self.path.start is not None
        return self.path.start + a[:, None, None] * self.step

    def _values(self, a: Float[Tensor, "item"]) -> Float[Tensor, "item"]:
        with torch.no_grad():
            return self.metric(self.rest(self.nodes.call, self._resid(a))).to(self.dtype) - self.start

    def scalars(self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"]) -> Float[Tensor, "item group"]:
        """See `quadrature.Integrand`."""
        points = a.to(self.dtype).to(self.device)
        return torch.cat([self._values(part) for part in torch.split(points, self.chunk)])[:, None]

    def sums(
        self,
        dst: Int[Tensor, "panel"],
        a: Float[Tensor, "panel node"],
        factors: Float[Tensor, "panel node column"],
        groups: Bool[Tensor, "panel group"],
    ) -> Float[Tensor, "column panel group part"]:
        """See `quadrature.Integrand`."""
        shape = (factors.shape[2], len(dst), 1, self.n_parts)
        result = torch.zeros(shape, dtype=self.dtype, device=self.device)
        points = a.flatten().to(self.dtype).to(self.device)
        weights = factors.flatten(0, 1).to(self.dtype).to(self.device)
        for part in torch.split(torch.arange(a.numel()), self.chunk):
            panel = (part // a.shape[1]).to(self.device)
            values = self._parts(points[part])
            for column, weight in zip(result[:, :, 0], weights[part].T, strict=True):
                column.index_add_(0, panel, values * weight[:, None])
        return result

    def _parts(self, a: Float[Tensor, "item"]) -> Float[Tensor, "item part"]:
        """Parts `<x_i - x0_i, dF/dx_i>` at single points."""
        read: dict[str, list[Tensor]] = {}

        def cut(z: Tensor) -> Tensor:
            leaf = z.detach().requires_grad_()
            read.setdefault("z", [z, leaf])
            return leaf

        assert self.nodes.z_path is not None
        hooks: dict[str, Hook] = {self.nodes.z_path: cut}
        by_autograd = self._sources
        if self.attention is None and self.split == "message":
            assert self.nodes.v_path is not None  # checked in attribution._recorded
            by_autograd = self._messages
            for path in (PATTERN_PATH, self.nodes.v_path):
                hooks[path] = read.setdefault(path, []).append
        with torch.enable_grad():
            resid = self._resid(a).requires_grad_()
            value = self.metric.checked(self.metric(self.rest(self.nodes.call, resid, hooks)))
            leaf = read["z"][1]
            # A metric may depend on positions that what comes later does not reach.
            by_z, by_skip = torch.autograd.grad(value.sum(), (leaf, resid), materialize_grads=True, retain_graph=True)
        n_heads, n_pos = self.shape[:2]
        gradient = by_z.reshape(len(a), n_pos, n_heads, -1).permute(2, 1, 0, 3)  # head dst item d_head
        heads = self._closed(a, gradient) if self.attention is not None else by_autograd(resid, read, gradient)
        return torch.cat([heads.flatten(1), (by_skip * self.step).sum(-1)], -1)

    def _closed(
        self, a: Float[Tensor, "item"], gradient: Float[Tensor, "head dst item d_head"]
    ) -> Float[Tensor, "item head src dst"]:
        assert self.attention is not None
        result = gradient.new_zeros(len(a), *self.shape)
        every = torch.arange(self.shape[1])
        for panels in self.attention.work(every, a.cpu().expand(len(every), -1), None, self.size):
            dst = panels.dst[0]
            displacement = self.attention.move(panels)
            if self.split == "message":
                values = self.attention.messages(panels, gradient[:, dst])
            else:
                values = self.attention.contributions(panels, displacement, gradient[:, dst])
            result[:, :, : panels.n_src, dst] = values.permute(2, 0, 3, 1)
        return result

    def _sources(
        self, resid: Tensor, read: Mapping[str, Sequence[Tensor]], gradient: Float[Tensor, "head dst item d_head"]
    ) -> Float[Tensor, "item head src dst"]:
        n_heads, n_pos = self.shape[:2]
        z = read["z"][0]
        result = gradient.new_zeros(len(resid), *self.shape)
        with torch.enable_grad():
            outputs = z.reshape(len(resid), n_pos, n_heads, -1).unbind(1)
            of_heads = [output.unbind(1) for output in outputs]
        for head in range(n_heads):
            for dst in range(n_pos):
                (by_resid,) = torch.autograd.grad(
                    of_heads[dst][head], resid, gradient[head, dst], retain_graph=True, materialize_grads=True
                )
                result[:, head, :, dst] = (by_resid * self.step).sum(-1)
        return result

    def _messages(
        self, resid: Tensor, read: Mapping[str, Sequence[Tensor]], gradient: Float[Tensor, "head dst item d_head"]
    ) -> Float[Tensor, "item head src dst"]:
        n_heads, n_pos = self.shape[:2]
        assert self.nodes.v_path is not None
        with torch.enable_grad():
            pattern = read[PATTERN_PATH][0].reshape(len(resid), n_heads, n_pos, n_pos)
            v = by_head(read[self.nodes.v_path][0], len(resid), n_pos, n_heads, gradient.shape[-1])
            messages = pattern * torch.einsum("hjne,nihe->nhji", gradient, v)
            # Every message's derivative along one step: differentiated twice, as what weights of 1 are multiplied with.
            weights = torch.ones_like(messages, requires_grad=True)
            (by_resid,) = torch.autograd.grad((weights * messages).sum(), resid, create_graph=True)
            (result,) = torch.autograd.grad((by_resid * self.step).sum(), weights, materialize_grads=True)
        return result.mT


def integrate_metric(
    nodes: BlockNodes,
    path: ResidPath,
    rest: Rest,
    metric: BatchMetric,
    known: tuple[float | None, float],
    budget: Budget,
    closed: bool,
    split: str,
) -> tuple[Float[Tensor, "head src dst"], Float[Tensor, "src"], Integral]:
    """Contributions to a metric through one block's heads and past them.

    Args:
        nodes: the block on the clean prompt, with attention nodes.
        path: shared by all destinations.
        rest: the model from the block on.
        metric: of its logits.
        known: its value in the run that the path starts from, if that is one of the model's, and in the clean run.
        budget: how hard to try.
        closed: whether to use the block's formula.
        split: what heads' outputs are split by, `source` or `message`.

    Returns:
        what each source contributes through each head to each destination, what it contributes past the heads, and
        the integral of one cell that both are parts of.
    """
    with torch.no_grad():
        integrand = _ToMetric(nodes, path, rest, metric, known, budget, closed, split)
        s0, s1 = layers_of_paths(path, torch.zeros(1, dtype=torch.long), nodes.eps, nodes.norms_to_z)
        # What logits that differ by rounding alone can do to the metric.
        noise = torch.full((1, 1), 8 * nodes.rounding * integrand.sensitivity)
        integral = integrate(integrand, s0, s1, noise, tol=budget.tol, max_nodes=budget.max_nodes)
    parts = integral.parts[0, 0]
    n_pos = integrand.shape[1]
    return parts[:-n_pos].reshape(integrand.shape), parts[-n_pos:], integral
