"""Scores along a path, and how fast they move.

Queries and keys are sums of parts, `x = sum_t r_t X_t + b` with every X on a straight line and r = 1 / sigma of its own
(`panels.py`), so scores are sums of terms: numbers r times polynomials in a, whose coefficients are tables of
destinations and sources. No query or key is evaluated at a node. Where relative positions have vectors of their own,
`q_j.P_ji` stands with what b_k gives, and `k_i.R_ji` with what b_q gives.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lig_lens.blocks.divisor import Divisor, Part, Tokens
from lig_lens.blocks.formula import FormulaValues
from lig_lens.blocks.pairing import per_query_head
from lig_lens.integrate.panels import OwnDivisor, Panels, Quotient, SharedDivisor

_Numbers = tuple[Tensor, Tensor]


def each(
    rows: Float[Tensor, "head *rows dim"], maps: Float[Tensor, "kv_head dim out"]
) -> Float[Tensor, "head *rows out"]:
    """Rows of every head times the matrix of its key-value head."""
    # Heads that share a key-value head stand one below the other.
    return (rows.reshape(len(maps), -1, rows.shape[-1]) @ maps).reshape(*rows.shape[:-1], maps.shape[-1])


class _Scores:
    """What both kinds of paths share: `fixed`, which does not move, and divisors, each made once."""

    def __init__(self, values: FormulaValues, dst: Int[Tensor, "dst"]) -> None:
        self.values, self.dst, self.score = values, dst, values.formula.score
        self.n_heads, self.relative = values.formula.n_heads, values.relative
        self.bias = values.bias[:, dst]
        # A cap comes before the bias.
        self.fixed = self.bias if self.score.cap is None else torch.zeros_like(self.bias)
        self.b_k = values.turn(values.formula.b_k.expand_as(values.end.k[0].vectors))
        self._divisors: dict[tuple[int, int], Any] = {}

    def _made(self, of: Divisor, times: Divisor | None, make: Callable[[], Any]) -> Any:
        key = id(of), id(times)
        if key not in self._divisors:
            self._divisors[key] = make()
        return self._divisors[key]

    def softmax(
        self, products: Float[Tensor, "head panel node src"], panels: Panels
    ) -> tuple[Float[Tensor, "head panel node src"], Float[Tensor, "head panel node src"] | None]:
        """The pattern, and how fast what enters the softmax follows the products (None: just as fast).

        Args:
            products: scaled, with `fixed`, which holds the bias where no cap comes between.
            panels: where they are taken.
        """
        capped = self.score.capped(products)
        steepness = self.score.steepness(capped)
        return self.score.softmax(capped if steepness is None else capped + panels.pick(self.bias)), steepness


class OwnScores(_Scores):
    """Of paths on which queries rest, and every key goes from the destination's own to the source's.

    A part of a key is `r ((1 - a) K_j + a K_i)` there, at the place of i: tables of `q_j.K_j` and of how far the
    product rises are all it takes.
    """

    def __init__(self, values: FormulaValues, dst: Int[Tensor, "dst"]) -> None:
        super().__init__(values, dst)
        formula, relative = values.formula, self.relative
        whole = sum((part.divided for part in values.end.q[1:]), values.end.q[0].divided)
        q = values.turn_queries(whole + formula.b_q)[:, dst]
        self.fixed = each(q, self.b_k.mT) + self.fixed
        if relative is not None:
            self.fixed = self.fixed + relative.of_queries(q, dst)
            self.fixed = self.fixed + relative.of_keys(per_query_head(self.b_k, self.n_heads), dst)
        self.terms = [self._term(q, part) for part in values.end.k]

    def divisor(self, end: Divisor) -> OwnDivisor:
        """What divides along the paths."""
        made: OwnDivisor = self._made(end, None, lambda: OwnDivisor(end, self.dst, self.n_heads))
        return made

    def _of(self, part: Part) -> OwnDivisor | Quotient:
        of, times = self.divisor(part.of), part.times
        if times is None:
            return of
        made: Quotient = self._made(part.of, times, lambda: Quotient(of, self.divisor(times)))
        return made

    def _term(self, q: Float[Tensor, "head dst d_head"], part: Part) -> tuple[Tensor, Tensor, OwnDivisor | Quotient]:
        """Where the products of one part start, how far they rise, and what divides them."""
        keys = per_query_head(part.vectors, self.n_heads)
        start, end = self._at_start(q, keys[:, self.dst]), each(q, self.values.turn(part.vectors).mT)
        if self.relative is not None:
            start = start + self.relative.of_own_keys(keys[:, self.dst], self.dst)
            end = end + self.relative.of_keys(keys, self.dst)
        return start, end - start, self._of(part)

    def _at_start(
        self, q: Float[Tensor, "head dst d_head"], own: Float[Tensor, "head dst d_head"]
    ) -> Float[Tensor, "head dst src"]:
        """`q_j.K_j` turned to the place of every source."""
        rotary = self.values.pairing.rotary
        if rotary is None:
            return (q * own).sum(-1, keepdim=True).expand(-1, -1, self.bias.shape[-1])
        n_pairs = rotary.cos.shape[-1]
        first, second, rest = rotary.split(own)
        q1, q2, q_rest = q[..., :n_pairs], q[..., n_pairs : 2 * n_pairs], q[..., 2 * n_pairs :]
        # In q.turn(k) the cos and sin of the place of i stand apart from what belongs to j.
        factors = torch.cat([q1 * first + q2 * second, q2 * first - q1 * second], -1)
        tables = torch.cat([rotary.cos, rotary.sin], -1)
        return factors @ tables.T + (q_rest * rest).sum(-1, keepdim=True)

    def at(self, panels: Panels) -> "OwnScoresAt":
        """Scores at the points of `panels`."""
        a, scores, terms = panels.a[..., None], panels.pick(self.fixed), []
        divided = _Divided(lambda one: one.on(panels))
        for start, rise, of in self.terms:
            term = _OwnTerm(torch.addcmul(panels.pick(start), a, picked := panels.pick(rise)), picked, *divided(of))
            scores = torch.addcmul(scores, term.line, term.r)
            terms.append(term)
        return OwnScoresAt(*self.softmax(scores, panels), terms, divided)


class _Divided:
    """What divisors give at some points, each evaluated once."""

    def __init__(self, on: Callable[[Any], _Numbers]) -> None:
        self._on = on
        self._known: dict[int, _Numbers] = {}

    def __call__(self, of: OwnDivisor | SharedDivisor | Quotient) -> _Numbers:
        if id(of) not in self._known:
            self._known[id(of)] = self._on(of)
        return self._known[id(of)]


@dataclass(frozen=True)
class _OwnTerm:
    """`r line`, where `line` rises by `rise`."""

    line: Float[Tensor, "head panel node src"]
    rise: Float[Tensor, "head panel 1 src"]
    r: Float[Tensor, "#head panel node #src"]
    slope: Float[Tensor, "#head panel node #src"]


@dataclass(frozen=True)
class OwnScoresAt:
    """The pattern at some points, which may be worked on in place, and what its scores are made of."""

    pattern: Float[Tensor, "head panel node src"]
    steepness: Float[Tensor, "head panel node src"] | None
    terms: Sequence[_OwnTerm]
    divided: _Divided
    """R = 1 / sigma there and (dr / da) / r, of a divisor: [#head panel node #src]."""

    def along(self, r_of_values: Tensor) -> Float[Tensor, "head panel node src"]:
        """How fast the scores move, in units of 1 / sigma of the values."""
        result = None
        for term in self.terms:
            one = torch.addcmul(term.rise, term.line, term.slope)
            if term.r is not r_of_values:
                one.mul_(term.r / r_of_values)
            result = one if result is None else result.add_(one)
        assert result is not None  # keys have a part at least
        return result if self.steepness is None else result.mul_(self.steepness)


@dataclass(frozen=True)
class Way:
    """Vectors on a straight line: both ends, or the last alone of those that start at 0, or that rest."""

    ends: tuple[Tensor, ...]
    rests: bool = False

    @classmethod
    def of(cls, start: Tensor, end: Tensor) -> "Way":
        """The way from `start` to `end`."""
        return cls((start, end) if bool(start.any()) else (end,))

    @property
    def from_zero(self) -> bool:
        """Whether it starts at 0."""
        return len(self.ends) == 1 and not self.rests

    def between(self, ends: Sequence[Tensor], a: Tensor) -> Tensor:
        """A point on the way of what is linear in the vectors, given at `ends`."""
        if self.rests:
            return ends[0]
        return a * ends[0] if len(ends) == 1 else torch.lerp(ends[0], ends[1], a)

    def step(self, ends: Sequence[Tensor]) -> Tensor:
        """From its start to its end."""
        return ends[0] if len(ends) == 1 else ends[1] - ends[0]


@dataclass(frozen=True)
class _Part:
    """A part of queries or keys on its way, and what divides it, if anything does."""

    way: Way
    of: SharedDivisor | Quotient | None

    def along(self, ends: Sequence[Tensor], line: Tensor, slope: Tensor | None) -> Tensor | None:
        """How fast products move with this part, but for 1 / sigma; None where they rest."""
        if self.way.rests:
            return None if slope is None else line * slope
        return self.way.step(ends) if slope is None else torch.addcmul(self.way.step(ends), line, slope)


class SharedScores(_Scores):
    """Of one path for all destinations, on which queries and keys move token by token.

    With one part each, `s_ji = r_j r_i Q_j.K_i + r_j Q_j.b_k + r_i b_q.K_i` and a constant: b_q and b_k are parts too.
    """

    def __init__(self, values: FormulaValues, dst: Int[Tensor, "dst"], start: Tokens) -> None:
        super().__init__(values, dst)
        end = values.end
        b_q = values.turn_queries(values.formula.b_q.expand_as(end.q[0].vectors))
        queries = [
            *self._parts(start.q, end.q, values.turn_queries, b_q),
            *self._resting(b_q, [part.of for part in end.q]),
        ]
        keys = [
            *self._parts(start.k, end.k, values.turn, self.b_k),
            *self._resting(self.b_k, [part.of for part in end.k]),
        ]
        self.terms = []
        for q in queries:
            for k in keys:
                tables = [[self._products(q, k, x[:, dst], y) for y in k.way.ends] for x in q.way.ends]
                if q.of is None and k.of is None and q.way.rests and k.way.rests:
                    self.fixed = self.fixed + tables[0][0]
                else:
                    self.terms.append((q, k, tables))

    def divisor(self, start: Divisor, end: Divisor) -> SharedDivisor:
        """What divides along the path."""
        made: SharedDivisor = self._made(end, None, lambda: SharedDivisor(start, end, self.n_heads))
        return made

    def _parts(
        self, start: Sequence[Part], end: Sequence[Part], turn: Callable[[Tensor], Tensor], bias: Tensor
    ) -> list[_Part]:
        made = []
        for first, last in zip(start, end, strict=True):
            ends = turn(first.vectors), turn(last.vectors)
            of = self.divisor(first.of, last.of)
            if first.times is not None and last.times is not None:
                quotient = functools.partial(Quotient, of, self.divisor(first.times, last.times))
                made.append(_Part(Way(ends[1:], rests=True), self._made(last.of, last.times, quotient)))
            elif last.of.constant:  # what no norm divides can stand with its bias
                made.append(_Part(Way.of(ends[0] + bias, ends[1] + bias), None))
            else:
                made.append(_Part(Way.of(*ends), of))
        return made

    def _resting(self, bias: Tensor, divisors: Sequence[Divisor]) -> list[_Part]:
        """The bias, if it does not stand with a part, and what relative positions add."""
        if any(one.constant for one in divisors):
            bias = torch.zeros_like(bias)
        return [_Part(Way((bias,), rests=True), None)] if self.relative is not None or bool(bias.any()) else []

    def _products(self, q: _Part, k: _Part, x: Tensor, y: Tensor) -> Float[Tensor, "head dst src"]:
        """Of queries of the destinations and keys of the sources, at one end each."""
        made = each(x, y.mT)
        if self.relative is not None and k.way.rests and k.of is None:
            made = made + self.relative.of_queries(x, self.dst)
        if self.relative is not None and q.way.rests and q.of is None:
            made = made + self.relative.of_keys(per_query_head(y, self.n_heads), self.dst)
        return made

    def at(self, panels: Panels) -> "SharedScoresAt":
        """Scores at the points of `panels`."""
        a, fixed = panels.a[..., None], panels.pick(self.fixed)
        by_dst = _Divided(lambda one: one.of_dst(panels))
        sources = _Divided(lambda one: one.of_sources(panels))
        scores: Tensor | None = None
        along_k: Tensor | None = None
        along_q: Tensor | None = None
        for q, k, tables in self.terms:
            r_own, slope_own = (None, None) if q.of is None else by_dst(q.of)
            r, slope = (None, None) if k.of is None else sources(k.of)
            both = r_own if r is None else r if r_own is None else r * r_own
            picked = [[panels.pick(table) for table in row] for row in tables]
            by_k = [q.way.between(ends, a) for ends in zip(*picked, strict=True)]  # at this query, the ends of the key
            by_q = [k.way.between(ends, a) for ends in picked]
            line = k.way.between(by_k, a)
            if scores is None:
                scores = fixed + line if both is None else torch.addcmul(fixed, line, both)
            else:
                _added(scores, line, both)
            # Derivatives of the scores along the keys' and along the query's path.
            along_k = _added(along_k, k.along(by_k, line, slope), both)
            along_q = _added(along_q, q.along(by_q, line, slope_own), both)
        assert scores is not None and along_k is not None and along_q is not None  # what moves stands first
        pattern, steepness = self.softmax(scores, panels)
        if steepness is not None:
            along_k, along_q = along_k.mul_(steepness), along_q.mul_(steepness)
        return SharedScoresAt(pattern, along_k, along_q, sources)


@dataclass(frozen=True)
class SharedScoresAt:
    """The pattern at some points; scores rise by `along_k` on the keys' path, and by `along_q` on the query's."""

    pattern: Float[Tensor, "head panel node src"]
    along_k: Float[Tensor, "head panel node src"]
    along_q: Float[Tensor, "head panel node src"]
    sources: _Divided
    """R = 1 / sigma of the sources there and (dr / da) / r, of a divisor."""


def _added(total: Tensor | None, term: Tensor | None, factor: Tensor | None) -> Tensor | None:
    """`total + factor term`, in place."""
    if term is None:
        return total
    if total is None:
        return term if factor is None else term * factor
    return total.add_(term) if factor is None else total.addcmul_(term, factor)
