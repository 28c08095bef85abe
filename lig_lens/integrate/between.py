"""What lies between the residual vectors that enter a block and its heads' outputs, on a path to a metric."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.blocks.messages import by_head
from lig_lens.blocks.reading import PATTERN_PATH
from lig_lens.blocks.values import Values
from lig_lens.integrate.attention_path import SharedPath
from lig_lens.models.running import Hook


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
