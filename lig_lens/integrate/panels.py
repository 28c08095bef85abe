"""Points on the paths of some destinations that are worked on together, and what norms divide by there.

Tensors are laid out `[head, panel, node, ...]`: a panel belongs to one destination, and its nodes are points on
that destination's path. Where heads ask for different panels, each has its own list, and what depends on nothing
but the panel has a head axis too; else that axis has length 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lig_lens.blocks.divisor import Biased, Divisor


@dataclass
class Panels:
    """Points on paths.

    Attributes:
        heads: numbers of the heads.
        rows: which of the panels that were asked for these are.
        own: number of the destination of each.
        dst: its position.
        a: points on its path.
        n_src: number of sources that any of them can see.
    """

    heads: Int[Tensor, "head 1"]
    rows: Int[Tensor, "#head panel"]
    own: Int[Tensor, "#head panel"]
    dst: Int[Tensor, "#head panel"]
    a: Float[Tensor, "#head panel node"]
    n_src: int

    def pick(self, table: Float[Tensor, "#head dst src"]) -> Float[Tensor, "#head panel 1 seen"]:
        """Rows of a table of destinations and sources, for the destinations and sources of these panels."""
        return table[..., : self.n_src][self._of(table), self.own][:, :, None]

    def of_own(self, vectors: Float[Tensor, "head dst dim"]) -> Float[Tensor, "head panel 1 dim"]:
        """What belongs to their destinations."""
        return vectors[self.heads, self.own][:, :, None]

    def at_dst(self, numbers: Float[Tensor, "#head pos"]) -> Float[Tensor, "#head panel 1 1"]:
        """Numbers of the tokens that their destinations are."""
        return numbers[self._of(numbers), self.dst][..., None, None]

    def seen(self, numbers: Float[Tensor, "#head pos"]) -> Float[Tensor, "#head 1 1 seen"]:
        """Numbers of the tokens that any of them can see."""
        return numbers[:, None, None, : self.n_src]

    def _of(self, table: Tensor) -> Tensor:
        return self.heads if len(table) > 1 else self.heads[:1]


class OwnDivisor:
    """Of every source on its way from a destination's residual to its own: sigma from products of tokens alone."""

    def __init__(self, divisor: Divisor, dst: Int[Tensor, "dst"], n_heads: int) -> None:
        self.divisor, self.constant, self.floor, self.n_heads = divisor, divisor.constant, divisor.floor, n_heads
        if not self.constant:
            square, table = divisor.product(divisor.vectors, divisor.vectors), divisor.table(dst)
            self.square, self.cross = (_for_heads(x, n_heads) for x in (square, table))
        self.bias = None if divisor.biased is None else _Bias(divisor.biased, divisor.biased, n_heads)
        self.before = None if divisor.biased is None else OwnDivisor(divisor.biased.before, dst, n_heads)

    def end(self, like: Float[Tensor, "_ pos _"]) -> Float[Tensor, "#head pos 1"]:
        """1 / sigma of every token where it is itself; `like` gives the dtype."""
        return _for_heads(self.divisor.value(like[:1]).reciprocal(), self.n_heads)

    def on(self, panels: Panels) -> tuple[Tensor, Tensor]:
        """R = 1 / sigma and (dr / da) / r: [#head panel node #src]."""
        a = panels.a[..., None]
        if self.constant:
            return torch.ones_like(a), torch.zeros_like(a)
        cross, start, end = panels.pick(self.cross), panels.at_dst(self.square), panels.seen(self.square)
        rest = 1 - a
        square = torch.addcmul(rest * rest * start + self.floor, 2 * a * rest, cross).addcmul_(a * a, end)
        fall = torch.addcmul(rest * start, a - rest, cross).addcmul_(a, end, value=-1)
        square.clamp_(min=self.floor)
        if self.bias is not None and self.before is not None:
            square, fall = self.bias.on(square, fall, self.before.on(panels), a, panels.at_dst, panels.seen)
        r = square.rsqrt_()
        return r, fall.mul_(r).mul_(r)


class SharedDivisor:
    """Of every token on one path, the same for all destinations."""

    def __init__(self, start: Divisor, end: Divisor, n_heads: int) -> None:
        self.constant = end.constant
        if self.constant:
            return
        # sigma^2 = steep (a - nearest)^2 + least + floor: no differences of large numbers where a path passes near 0.
        step = [b - a for a, b in zip(start.vectors, end.vectors, strict=True)]
        steep, along = end.product(step, step), end.product(start.vectors, step)
        nearest = torch.where(steep > 0, -along / steep, 0.0)
        closest = [x + nearest[..., None] * d for x, d in zip(start.vectors, step, strict=True)]
        least = end.product(closest, closest) + end.floor
        self.steep, self.nearest, self.least = (_for_heads(x, n_heads) for x in (steep, nearest, least))
        self.bias = None
        if start.biased is not None and end.biased is not None:
            self.bias = _Bias(start.biased, end.biased, n_heads)
            self.before = SharedDivisor(start.biased.before, end.biased.before, n_heads)

    def of_dst(self, panels: Panels) -> tuple[Tensor, Tensor]:
        """R = 1 / sigma and (dr / da) / r of the destinations: [#head panel node 1]."""
        return self._at(panels.a[..., None], panels.at_dst)

    def of_sources(self, panels: Panels) -> tuple[Tensor, Tensor]:
        """The same of all tokens: [#head panel node #src]."""
        return self._at(panels.a[..., None], panels.seen)

    def _at(self, a: Tensor, pick: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        if self.constant:
            return torch.ones_like(a), torch.zeros_like(a)
        away, steep = a - pick(self.nearest), pick(self.steep)
        square, fall = torch.addcmul(pick(self.least), steep, away * away), -steep * away
        if self.bias is not None:
            square, fall = self.bias.on(square, fall, self.before._at(a, pick), a, pick, pick)
        r = square.rsqrt()
        return r, fall * r * r


class _Bias:
    """What a bias before a norm adds to the square of its divisor, along a path."""

    def __init__(self, start: Biased, end: Biased, n_heads: int) -> None:
        self.biased, self.square = end, _for_heads(end.square, n_heads)[:, :, None, None]
        self.along = [_for_heads(one.along, n_heads) for one in (start, end)]

    def on(
        self,
        square: Tensor,
        fall: Tensor,
        before: tuple[Tensor, Tensor],
        a: Tensor,
        first: Callable[[Tensor], Tensor],
        last: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The square and minus half its derivative, from those without the bias.

        Args:
            square: see above.
            fall: see above.
            before: 1 / sigma of the block's own norm, and its derivative relative to it.
            a: points on the path.
            first: picks numbers of the tokens that a path starts at.
            last: and of those that it ends at.
        """
        r, slope = before
        sigma, start = 1 / r, first(self.along[0])
        rise = last(self.along[1]) - start
        along = start + a * rise
        moves = (slope * along - rise) / 2 + sigma * slope * (self.square + self.biased.eps)
        return self.biased.on(square, sigma, along, self.square), fall + sigma * moves


class Quotient:
    """One divisor over another: what rests is multiplied by the second's sigma and divided by the first's."""

    constant = False

    def __init__(self, of: "OwnDivisor | SharedDivisor", times: "OwnDivisor | SharedDivisor") -> None:
        self._of, self._times = of, times

    def on(self, panels: Panels) -> tuple[Tensor, Tensor]:
        """See `OwnDivisor`."""
        return self._each(lambda one: one.on(panels))

    def of_dst(self, panels: Panels) -> tuple[Tensor, Tensor]:
        """See `SharedDivisor`."""
        return self._each(lambda one: one.of_dst(panels))

    def of_sources(self, panels: Panels) -> tuple[Tensor, Tensor]:
        """See `SharedDivisor`."""
        return self._each(lambda one: one.of_sources(panels))

    def _each(self, on: "Callable[[Any], tuple[Tensor, Tensor]]") -> tuple[Tensor, Tensor]:
        (r, slope), (r_times, slope_times) = on(self._of), on(self._times)
        return r / r_times, slope - slope_times


def _for_heads(table: Tensor, n_heads: int) -> Tensor:
    """What key-value heads have, once for each head that shares them; what all heads share as it is."""
    return table if len(table) == 1 else table.repeat_interleave(n_heads // len(table), 0)
