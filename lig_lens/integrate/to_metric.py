"""Contributions to a metric: the path runs through one block's attention, and the rest of the model runs along.

Along `x(a)`, the residual vectors from one run to another, with z and skip the two ways on from x,

    dF/da = sum_src <dx_src, dF/dskip_src> + sum_{head, dst, src} <dF/dz_{dst, head}, (dz_{dst, head}/dx_src) dx_src>

so one forward and backward pass of the rest of the model for all destinations at once gives the gradients at z and at
the skip connection, and what lies between x and z is attention's formula, or autograd where it has none. With
`split="message"` the second sum goes over messages instead, `z_{dst, head} = sum_src p_{dst, src} v_src`: its terms are
`<dF/dz_{dst, head}, d(p_{dst, src} v_src)/da>`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lig_lens.blocks.messages import by_head
from lig_lens.blocks.reading import PATTERN_PATH
from lig_lens.blocks.values import Values
from lig_lens.integrate.attention_path import SharedPath
from lig_lens.integrate.integrand import Budget
from lig_lens.integrate.onward import Downstream, Entry, Onward, entry_of
from lig_lens.integrate.quadrature import Integral
from lig_lens.models.running import Hook, torch_hooks
from lig_lens.paths.path import ResidPath


class Between(ABC):
    """What lies between the residual vectors that enter a block and its heads' outputs."""

    def hooks(self) -> dict[str, Hook]:
        """Hooks on the block that are needed beside those at the head outputs; none by default."""
        return {}

    @abstractmethod
    def contributions(
        self,
        a: Float[Tensor, "item"],
        resid: Float[Tensor, "item pos d_model"],
        z: Float[Tensor, "..."],
        gradient: Float[Tensor, "head dst item d_head"],
    ) -> Float[Tensor, "item head src dst"]:
        """What each source contributes through each head, given the metric's gradient at the head outputs.

        Args:
            a: points on the path.
            resid: residual vectors there, from which autograd can follow `z`.
            z: head outputs.
            gradient: of the metric.
        """


class ClosedBetween(Between):
    """By the attention's formula, sources or messages."""

    def __init__(self, values: Values, path: SharedPath, size: int, by_message: bool) -> None:
        self.path, self.size, self.by_message = path, size, by_message
        self.shape = (values.heads.n_heads, len(values), len(values))

    def contributions(
        self,
        a: Float[Tensor, "item"],
        resid: Float[Tensor, "item pos d_model"],
        z: Float[Tensor, "..."],
        gradient: Float[Tensor, "head dst item d_head"],
    ) -> Float[Tensor, "item head src dst"]:
        """See the base class."""
        result = gradient.new_zeros(len(a), *self.shape)
        every = torch.arange(self.shape[1])
        for panels in self.path.work(every, a.cpu().expand(len(every), -1), None, self.size):
            dst, moved = panels.dst[0], self.path.move(panels)
            values = (moved.messages if self.by_message else moved.contributions)(gradient[:, dst])
            result[:, :, : panels.n_src, dst] = values.permute(2, 0, 3, 1)
        return result


class SourcesByAutograd(Between):
    """By one backward pass for each head and destination."""

    def __init__(self, values: Values, step: Float[Tensor, "pos d_model"]) -> None:
        self.step, self.n_heads, self.n_pos = step, values.heads.n_heads, len(values)

    def contributions(
        self,
        a: Float[Tensor, "item"],
        resid: Float[Tensor, "item pos d_model"],
        z: Float[Tensor, "..."],
        gradient: Float[Tensor, "head dst item d_head"],
    ) -> Float[Tensor, "item head src dst"]:
        """See the base class."""
        result = gradient.new_zeros(len(resid), self.n_heads, self.n_pos, self.n_pos)
        with torch.enable_grad():
            outputs = z.reshape(len(resid), self.n_pos, self.n_heads, -1).unbind(1)
            of_heads = [output.unbind(1) for output in outputs]
        for head in range(self.n_heads):
            for dst in range(self.n_pos):
                (by_resid,) = torch.autograd.grad(
                    of_heads[dst][head], resid, gradient[head, dst], retain_graph=True, materialize_grads=True
                )
                result[:, head, :, dst] = (by_resid * self.step).sum(-1)
        return result


class MessagesByAutograd(Between):
    """All messages' derivatives along the path at once, from the pattern and values that the hooks show."""

    def __init__(self, values: Values, step: Float[Tensor, "pos d_model"], v_path: str) -> None:
        self.step, self.n_heads, self.n_pos, self.v_path = step, values.heads.n_heads, len(values), v_path
        self._read: dict[str, Tensor] = {}

    def hooks(self) -> dict[str, Hook]:
        """See the base class."""
        self._read = {}
        return {path: self._reading(path) for path in (PATTERN_PATH, self.v_path)}

    def _reading(self, path: str) -> Hook:
        def read(value: Tensor) -> None:
            self._read.setdefault(path, value)

        return read

    def contributions(
        self,
        a: Float[Tensor, "item"],
        resid: Float[Tensor, "item pos d_model"],
        z: Float[Tensor, "..."],
        gradient: Float[Tensor, "head dst item d_head"],
    ) -> Float[Tensor, "item head src dst"]:
        """See the base class."""
        with torch.enable_grad():
            pattern = self._read[PATTERN_PATH].reshape(len(resid), self.n_heads, self.n_pos, self.n_pos)
            v = by_head(self._read[self.v_path], len(resid), self.n_pos, self.n_heads, gradient.shape[-1])
            messages = pattern * torch.einsum("hjne,nihe->nhji", gradient, v)
            # Every message's derivative along one step: differentiated twice, as what weights of 1 are multiplied with.
            weights = torch.ones_like(messages, requires_grad=True)
            (by_resid,) = torch.autograd.grad((weights * messages).sum(), resid, create_graph=True)
            (result,) = torch.autograd.grad((by_resid * self.step).sum(), weights, materialize_grads=True)
        return result.mT


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
    values: Values, path: ResidPath, between: Between, down: Downstream, known: float | None, budget: Budget
) -> tuple[Float[Tensor, "head src dst"], Float[Tensor, "src"], Integral]:
    """Contributions to a metric through one block's heads and past them.

    Args:
        values: of the clean prompt at the block.
        path: shared by all destinations.
        between: what lies between residual vectors and head outputs.
        down: the model from the block on.
        known: the metric in the run that the path starts from, if that is one of the model's.
        budget: how hard to try.

    Returns:
        what each source contributes through each head to each destination, what it contributes past the heads, and
        the integral of one cell that both are parts of.

    Raises:
        BoundaryError: the model gives something else when it is run from the block on.
    """
    entry = entry_of(values, path)
    integral = _ThroughHeads(entry, values, between, down, budget).integrate(known, budget)
    parts = integral.parts[0, 0]
    n_pos, n_heads = values.heads.z.shape[:2]
    return parts[:-n_pos].reshape(n_heads, n_pos, n_pos), parts[-n_pos:], integral
