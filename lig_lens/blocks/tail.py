"""The rest of a block after attention, run at single points of paths.

It acts token by token (`layout_fit.py` checks that), so points of any paths can stand side by side.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lig_lens.blocks.inside import relative
from lig_lens.blocks.values import Values
from lig_lens.models.running import Hook, answering, module_hooks, with_first_tensor

# What a block may raise when its attention hands over something else than usual; then all of it is run.
_PROBLEMS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


class Tail:
    """resid_post from the attention output (W_O z + b_O, before any norm on it) and the skip connection.

    `out` is what comes out at the points that it is made with, `scales` what the norms there divide by.
    """

    def __init__(
        self,
        values: Values,
        attn_out: Float[Tensor, "item d_model"],
        skip: Float[Tensor, "item d_model"],
        positions: Int[Tensor, "item"],
    ) -> None:
        """Run the tail at some points, which stand at these positions of the prompt.

        Where attention hands nothing but its output on, it need not run: that is tried here, and kept up if the same
        comes out.
        """
        self.values = values
        self.scales = Scales(values)
        self._usual: Any = None  # what attention returns
        hooks = self.scales.hooks(lambda value: value.flatten(0, 1)[: len(attn_out)])
        with torch.no_grad():
            if not values.heads.nodes.ends_there:
                self.out = self._whole(attn_out, skip, positions, hooks)
                return
            usual: list[Any] = []
            with module_hooks([(values.call.modules["attn"], lambda *seen: usual.append(seen[-1]), False)]):
                self.out = self._whole(attn_out, skip, positions, hooks)
            self._usual = usual[0]
            # A row of another length than the prompt's: nothing in the block may depend on that.
            n_items = len(skip) + (2 if len(skip) + 1 == len(values) else 1)
            more = torch.arange(n_items, device=skip.device).clamp(max=len(skip) - 1)
            try:
                again = self._bare(attn_out[more], skip[more], positions[more])[: len(skip)]
            except _PROBLEMS:
                self._usual = None
                self._whole(attn_out, skip, positions, {})  # what is not due to the missing attention is raised again
            else:
                if not relative(again - self.out, self.out) <= 1e-5:
                    self._usual = None

    def __call__(
        self,
        attn_out: Float[Tensor, "item d_model"],
        skip: Float[Tensor, "item d_model"],
        positions: Int[Tensor, "item"],
    ) -> Float[Tensor, "item d_model"]:
        """resid_post at any points."""
        return (
            self._whole(attn_out, skip, positions, {}) if self._usual is None else self._bare(attn_out, skip, positions)
        )

    def _whole(self, attn_out: Tensor, skip: Tensor, positions: Tensor, hooks: dict[str, Hook]) -> Tensor:
        """Attention runs too, so points are packed into rows of the prompt's length, for which its mask is made."""
        n_items, n_pos = len(attn_out), len(self.values)
        rows = -(-n_items // n_pos)
        index = torch.arange(rows * n_pos, device=attn_out.device).clamp(max=n_items - 1)
        attn_out, skip = (leaf[index].reshape(rows, n_pos, -1) for leaf in (attn_out, skip))
        return self.values.run_tail(attn_out, skip, hooks, positions[index]).flatten(0, 1)[:n_items]

    def _bare(self, attn_out: Tensor, skip: Tensor, positions: Tensor) -> Tensor:
        """Attention hands over what it is told to."""
        call = self.values.call
        with answering(call.modules["attn"], with_first_tensor(self._usual, attn_out[None])):
            return call.run(skip[None], positions=positions)[0]


class Scales:
    """What the norms after attention divide by at the start of paths; at their ends it is known from the prompt."""

    def __init__(self, values: Values) -> None:
        self.end, self.n_pos = values.tail_scales, len(values)
        self.start: dict[str, list[Tensor]] = {path: [] for path in self.end}

    def hooks(self, pick: Callable[[Tensor], Tensor]) -> dict[str, Hook]:
        """Hooks that read them in one run; `pick` takes the wanted items from [batch, pos]."""
        waiting = set(self.end)  # some hooks fire again for every input of attention
        return {path: functools.partial(self._read, waiting, path, pick) for path in self.end}

    def _read(self, waiting: set[str], path: str, pick: Callable[[Tensor], Tensor], value: Tensor) -> None:
        if path in waiting:
            waiting.discard(path)
            # Items and positions may have been flattened.
            self.start[path].append(pick(value.detach()[..., 0].reshape(-1, self.n_pos)))

    def widths(self, dst: Int[Tensor, "dst"]) -> tuple[Float[Tensor, "dst"], Float[Tensor, "dst"]]:
        """Share of a path, at its start and at its end, in which these norms turn to the direction of the other end.

        Each norm sees the turn of the one before it, so their shares multiply.
        """
        s0, s1 = (torch.ones(len(dst), dtype=torch.float64) for _ in range(2))
        for path, end in self.end.items():
            ratio = (torch.cat(self.start[path]) / end[dst]).cpu().double()
            s0, s1 = s0 * ratio.clamp(max=1.0), s1 * ratio.clamp(min=1.0).reciprocal()
        return s0, s1
