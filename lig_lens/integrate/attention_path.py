"""What attention does along a path, in closed form: where z is, and what each source contributes to a scalar of it.

Attention is `u_j = sum_i p_ji v_i` with `p = softmax(s)`. For a scalar with gradient g_j at u_j, source i gets

    c_ji = p_ji [ds_ji (g_j.v_i - g_j.u_j) + g_j.dv_i],    d for the derivative along source i's own path,

and where the query moves too, the destination's own source also `sum_k p_jk (dq_j.k_k) (g_j.v_k - g_j.u_j)`
(docs/method.md, where every line is derived). All sources, heads and destinations together cost a few
attention-sized matrix products per node of the rule, and no automatic differentiation.

Scores may be capped, `s = cap(x)`, and then ds = cap'(x) dx; where a sink takes part in the softmax, p adds up to less
than 1 and the same formula holds. Norms divide vectors by numbers r = 1 / sigma of their own (`panels.py`), those of
queries and keys by others than those of values. Tensors are laid out as `panels.py` says.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lig_lens.blocks.formula import FormulaValues, Tokens, per_query_head
from lig_lens.integrate.panels import OwnDivisor, Panels, SharedDivisor

# Heads get lists of their own where the longest of them is shorter than this share of all panels.
_OWN_LISTS = 0.7


@dataclass(frozen=True)
class Moved(ABC):
    """Attention at the points of some panels: how far z has moved, and what contributions are made from.

    Attributes:
        panels: the points.
        displacement: of z, from the start of the path.
    """

    panels: Panels
    displacement: Float[Tensor, "head panel node d_head"]

    @abstractmethod
    def contributions(self, gradient: Float[Tensor, "head panel node d_head"]) -> Float[Tensor, "head panel node src"]:
        """`<x_i - x0_i, dL/dx_i>` through attention; once, since it works in place.

        Args:
            gradient: of L, at z.
        """


class AttentionPath(ABC):
    """A path of residual vectors through one block's attention, for the destinations `dst`.

    `z_start` are the destinations' head outputs at the start of their paths.
    """

    z_start: Float[Tensor, "head dst d_head"]

    def __init__(self, values: FormulaValues, dst: Int[Tensor, "dst"]) -> None:
        self.formula, self.dst, self.score = values.formula, dst, values.formula.score
        self.n_heads, self.n_kv_heads = self.formula.n_heads, self.formula.n_kv_heads
        self.heads = torch.arange(self.n_heads, device=dst.device)[:, None]
        self.bias = values.bias[:, dst]
        # A cap comes before the bias.
        self.fixed = self.bias if self.score.cap is None else torch.zeros_like(self.bias)
        self.b_k = values.turn(self.formula.b_k.expand_as(values.end.k))
        sources = torch.arange(1, self.bias.shape[-1] + 1, device=dst.device)
        seen = (torch.isfinite(self.bias).any(0) * sources).amax(-1)
        self._n_seen = torch.maximum(seen, dst + 1).cpu()

    def work(
        self,
        own: Int[Tensor, "panel"],
        a: Float[Tensor, "panel node"],
        groups: Bool[Tensor, "panel group"] | None,
        size: int,
    ) -> Iterator[Panels]:
        """Portions of the panels that fit into `size` numbers per tensor, those that see most sources last.

        All of `own`, `a` and `groups` are on the CPU, so nothing here waits for a device. Without
        groups, or with one column of them, all heads work on the same panels.
        """
        n_seen = self._n_seen[own]
        rows = torch.argsort(n_seen)[None]
        most = len(own) if groups is None or groups.shape[1] == 1 else int(groups.sum(0).max())
        if groups is not None and most < _OWN_LISTS * len(own):
            # What a head asks for comes first; what it does not ask for fills its list up.
            first = torch.argsort(~groups[rows[0]], dim=0, stable=True)[:most]
            rows = rows[0][first].T
        reach = n_seen[rows].amax(0)
        numbers, start = size // (self.n_heads * a.shape[1]), 0
        while start < len(reach):
            furthest = torch.cummax(reach[start:], 0).values
            fitting = int((torch.arange(1, len(furthest) + 1) * furthest <= numbers).sum())
            stop = start + max(1, fitting)
            part = rows[:, start:stop]
            on_device = own[part].to(self.dst.device)
            points = a[part].to(self.b_k.dtype).to(self.dst.device)
            n_src = int(reach[start:stop].max())
            yield Panels(self.heads, part.to(self.dst.device), on_device, self.dst[on_device], points, n_src)
            start = stop

    @abstractmethod
    def move(self, panels: Panels) -> Moved:
        """Attention at the points of `panels`."""

    def per_head(self, kv: Float[Tensor, "kv_head rest dim"]) -> Float[Tensor, "head rest dim"]:
        """What key-value heads have, once for each head that shares them."""
        return per_query_head(kv, self.n_heads)

    def starts(self, size: int) -> Iterator[Panels]:
        """The start of every path, in portions as `work` makes them."""
        return self.work(torch.arange(len(self.dst)), torch.zeros(len(self.dst), 1), None, size)

    def scores(
        self, products: Float[Tensor, "head panel node src"], panels: Panels
    ) -> tuple[Float[Tensor, "head panel node src"], Float[Tensor, "head panel node src"] | None]:
        """What enters the softmax, and how fast it follows the products (None: just as fast).

        Args:
            products: scaled, with `fixed`, which holds the bias where no cap comes between.
            panels: where they are taken.
        """
        capped = self.score.capped(products)
        steepness = self.score.steepness(capped)
        return (capped if steepness is None else capped + panels.pick(self.bias)), steepness

    def each(
        self, rows: Float[Tensor, "head *rows dim"], maps: Float[Tensor, "kv_head dim out"]
    ) -> Float[Tensor, "head *rows out"]:
        """Rows of every head times the matrix of its key-value head."""
        # Heads that share a key-value head stand one below the other.
        return (rows.reshape(self.n_kv_heads, -1, rows.shape[-1]) @ maps).reshape(*rows.shape[:-1], maps.shape[-1])


class OwnPaths(AttentionPath):
    """ITB: every source goes from the destination's own residual to its own, one set of paths per destination.

    The query rests. With K and V homogeneous keys and values, the key of source i on the path of destination j is
    `r ((1 - a) K_j + a K_i) + b` at the place of i, `r = 1 / sigma_ij(a)`, and the same holds for values. sigma
    follows from products of tokens alone, so nothing is evaluated once per pair and node but numbers.
    """

    def __init__(self, values: FormulaValues, dst: Int[Tensor, "dst"]) -> None:
        super().__init__(values, dst)
        formula, end = self.formula, values.end
        self.of_k = OwnDivisor(end.of_k, dst, self.n_heads)
        self.of_v = self.of_k if end.of_v is end.of_k else OwnDivisor(end.of_v, dst, self.n_heads)
        q = values.turn_queries(end.q / end.of_q.value(end.q) + formula.b_q)[:, dst]
        self.at_start = self._at_start(values, q)
        self.rise = self.each(q, values.turn(end.k).mT) - self.at_start
        self.fixed = self.each(q, self.b_k.mT) + self.fixed
        self.v, self.v_and_minus = end.v, torch.cat([end.v, -torch.ones_like(end.v[..., :1])], -1).mT
        self.own_v, self.b_v = self.per_head(end.v)[:, dst], self.per_head(formula.b_v)
        self.r_own = self.of_v.end(end.v)[:, dst].expand(self.n_heads, -1, -1)
        # What the sink leaves of the pattern at the start, where all sources have the destination's own value.
        self.mass = torch.ones_like(self.r_own)
        if self.score.sink is not None:
            for panels in self.starts(q.numel()):
                self.mass[panels.heads, panels.own] = self._attend(panels)[0].sum(-1)
        self.z_start = self.mass * (self.own_v * self.r_own + self.b_v)

    def _at_start(self, values: FormulaValues, q: Float[Tensor, "head dst d_head"]) -> Float[Tensor, "head dst src"]:
        """`q_j.K_j` turned to the place of every source."""
        own, rotary = self.per_head(values.end.k[:, self.dst]), values.rotary
        if rotary is None:
            return (q * own).sum(-1, keepdim=True).expand(-1, -1, values.end.k.shape[1])
        n_pairs = rotary.cos.shape[-1]
        first, second, rest = rotary.split(own)
        q1, q2, q_rest = q[..., :n_pairs], q[..., n_pairs : 2 * n_pairs], q[..., 2 * n_pairs :]
        # In q.turn(k) the cos and sin of the place of i stand apart from what belongs to j.
        factors = torch.cat([q1 * first + q2 * second, q2 * first - q1 * second], -1)
        tables = torch.cat([rotary.cos, rotary.sin], -1)
        return factors @ tables.T + (q_rest * rest).sum(-1, keepdim=True)

    def _attend(self, panels: Panels) -> tuple[Tensor, "_Keys"]:
        """The pattern, and how the scores move."""
        a = panels.a[..., None]
        rise, (r, slope) = panels.pick(self.rise), self.of_k.on(panels)
        line = torch.addcmul(panels.pick(self.at_start), a, rise)
        scores, steepness = self.scores(torch.addcmul(panels.pick(self.fixed), line, r), panels)
        return self.score.softmax(scores), _Keys(line, rise, r, slope, steepness)

    def move(self, panels: Panels) -> "OwnMoved":
        """See the base class."""
        a = panels.a[..., None]
        pattern, keys = self._attend(panels)
        r, slope = (keys.r, keys.slope) if self.of_v is self.of_k else self.of_v.on(panels)
        own, r_own = panels.of_own(self.own_v), panels.of_own(self.r_own)
        kept = panels.of_own(self.mass)
        shift = None if self.score.sink is None else (pattern.sum(-1, keepdim=True) - kept) * self.b_v[:, None]
        weights = pattern.mul_(r)
        summed, total = self.each(weights, self.v[:, : panels.n_src]), weights.sum(-1, keepdim=True)
        displacement = a * (summed - total * own) + (total - kept * r_own) * own
        if shift is not None:
            displacement += shift
        return OwnMoved(panels, displacement, self, keys, weights, r, slope, own)


@dataclass(frozen=True)
class _Keys:
    """Scores of `OwnPaths`, before any cap `r line + fixed`, on the way: `line` rises by `rise`."""

    line: Float[Tensor, "head panel node src"]
    rise: Float[Tensor, "head panel 1 src"]
    r: Float[Tensor, "#head panel node #src"]
    slope: Float[Tensor, "#head panel node #src"]
    steepness: Float[Tensor, "head panel node src"] | None

    def along(self, r_of_values: Tensor) -> Float[Tensor, "head panel node src"]:
        """How fast the scores move, in units of 1 / sigma of the values."""
        result = torch.addcmul(self.rise, self.line, self.slope)
        if self.r is not r_of_values:
            result.mul_(self.r / r_of_values)
        return result if self.steepness is None else result.mul_(self.steepness)


@dataclass(frozen=True)
class OwnMoved(Moved):
    """What `OwnPaths.move` keeps."""

    path: OwnPaths
    keys: _Keys
    weights: Float[Tensor, "head panel node src"]
    """Pattern times r."""
    r: Float[Tensor, "#head panel node #src"]
    slope: Float[Tensor, "#head panel node #src"]
    own: Float[Tensor, "head panel 1 d_head"]
    """Homogeneous value of the destination."""

    def contributions(self, gradient: Float[Tensor, "head panel node d_head"]) -> Float[Tensor, "head panel node src"]:
        """See the base class."""
        path, panels, a = self.path, self.panels, self.panels.a[..., None]
        along_own = (gradient * self.own).sum(-1, keepdim=True)
        # g.b_v - g.u_j, where b_v counts only as far as a sink takes from it
        kept = panels.of_own(path.mass)
        rest = -(gradient * self.displacement).sum(-1, keepdim=True) - kept * panels.of_own(path.r_own) * along_own
        if path.score.sink is not None:
            rest = rest + (1 - kept) * (gradient * path.b_v[:, None]).sum(-1, keepdim=True)
        # g.(V_i - V_j), and from it g.v_i / r and g.v_i - g.u_j
        values = path.each(torch.cat([gradient, along_own], -1), path.v_and_minus[..., : panels.n_src])
        line = torch.addcmul(along_own, a, values)
        above = torch.addcmul(rest, line, self.r)
        result = self.keys.along(self.r).mul_(above).add_(values).addcmul_(line, self.slope).mul_(self.weights)
        # A source that does not move contributes nothing, rounding included.
        return result.scatter_(-1, panels.dst[..., None, None].expand(*result.shape[:-1], 1), 0.0)


class SharedPath(AttentionPath):
    """One path for all destinations (zero, corrupted, a tensor): queries, keys and values move token by token.

    With Q and K homogeneous, on straight lines from start to end, scores are
    `r_j r_i Q_j.K_i + r_j Q_j.b_k + r_i b_q.K_i` and a constant: the products are polynomials in a, whose coefficients
    are tables of destinations and sources, so no query or key is evaluated at a node.
    """

    def __init__(self, values: FormulaValues, dst: Int[Tensor, "dst"], start: Tokens) -> None:
        super().__init__(values, dst)
        formula, end = self.formula, values.end
        self.of_v = SharedDivisor(start.of_v, end.of_v, self.n_heads)
        self.of_q, self.of_k = (
            self.of_v if last is end.of_v else SharedDivisor(first, last, self.n_heads)
            for first, last in ((start.of_q, end.of_q), (start.of_k, end.of_k))
        )
        b_q, b_k = values.turn_queries(formula.b_q.expand_as(end.q)), self.b_k
        q = [values.turn_queries(tokens.q) for tokens in (start, end)]
        k = [values.turn(tokens.k) for tokens in (start, end)]
        # What no norm divides can stand with its bias.
        if self.of_q.constant:
            q, b_q = [x + b_q for x in q], torch.zeros_like(b_q)
        if self.of_k.constant:
            k, b_k = [x + b_k for x in k], torch.zeros_like(b_k)
        self.from_zero = not bool(torch.stack([x.any() for x in (*q[:1], *k[:1], start.v)]).any())
        q, b_q = [x[:, dst] for x in q], b_q[:, dst]
        self.products_qk = [[self.each(x, y.mT) for y in k] for x in q]
        self.products_q = [self.each(x, b_k.mT) for x in q] if bool(b_k.any()) else None
        self.products_k = [self.each(b_q, y.mT) for y in k] if bool(b_q.any()) else None
        if bool(b_q.any() & b_k.any()):
            self.fixed = self.fixed + self.each(b_q, b_k.mT)
        self.v, self.b_v = (start.v, end.v), self.per_head(formula.b_v)
        # Values without their bias, which drops out of every difference, but for what a sink takes.
        self.v_start = torch.zeros_like(self.per_head(end.v)[:, dst])
        if not self.from_zero or self.score.sink is not None:
            for panels in self.starts(q[0].numel()):
                self.v_start[:, panels.own[0]] = self.move(panels).displacement[:, :, 0]
        self.z_start = self.v_start + self.b_v if self.score.sink is None else self.v_start

    def between(self, ends: Sequence[Tensor], a: Tensor) -> Tensor:
        """A point on the line between two ends; lines from 0 cost less."""
        return a * ends[1] if self.from_zero else torch.lerp(ends[0], ends[1], a)

    def step(self, ends: Sequence[Tensor]) -> Tensor:
        """From one end to the other."""
        return ends[1] if self.from_zero else ends[1] - ends[0]

    def move(self, panels: Panels) -> "SharedMoved":
        """See the base class."""
        a, n_src = panels.a[..., None], panels.n_src
        r_own, slope_own = self.of_q.of_dst(panels)
        r, slope = self.of_k.of_sources(panels)
        qk = [[panels.pick(table) for table in row] for row in self.products_qk]
        by_k = [self.between((qk[0][i], qk[1][i]), a) for i in (0, 1)]  # at this query, both ends of the key
        by_q = [self.between(qk[i], a) for i in (0, 1)]
        line, both = self.between(by_k, a), r * r_own
        scores = torch.addcmul(panels.pick(self.fixed), line, both)
        # Derivatives of the scores along the keys' and along the query's path.
        along_k = torch.addcmul(self.step(by_k), line, slope).mul_(both)
        along_q = torch.addcmul(self.step(by_q), line, slope_own).mul_(both)
        if self.products_q is not None:
            ends = [panels.pick(table) for table in self.products_q]
            line = self.between(ends, a)
            scores.addcmul_(line, r_own)
            along_q.addcmul_(torch.addcmul(self.step(ends), line, slope_own), r_own)
        if self.products_k is not None:
            ends = [panels.pick(table) for table in self.products_k]
            line = self.between(ends, a)
            scores.addcmul_(line, r)
            along_k.addcmul_(torch.addcmul(self.step(ends), line, slope), r)
        scores, steepness = self.scores(scores, panels)
        if steepness is not None:
            along_k, along_q = along_k.mul_(steepness), along_q.mul_(steepness)
        pattern = self.score.softmax(scores)
        if self.of_v is not self.of_k:
            r, slope = self.of_v.of_sources(panels)
        weights = pattern * r
        ends = [torch.empty(0) if self.from_zero else self.each(weights, self.v[0][:, :n_src])]
        ends.append(self.each(weights, self.v[1][:, :n_src]))
        displacement = self.between(ends, a) - panels.of_own(self.v_start)
        if self.score.sink is not None:
            displacement += pattern.sum(-1, keepdim=True) * self.b_v[:, None]
        return SharedMoved(panels, displacement, self, pattern, weights, r, slope, along_k, along_q)


@dataclass(frozen=True)
class SharedMoved(Moved):
    """What `SharedPath.move` keeps; scores rise by `along_k` on the keys' path, and by `along_q` on the query's."""

    path: SharedPath
    pattern: Float[Tensor, "head panel node src"]
    weights: Float[Tensor, "head panel node src"]
    """Pattern times r."""
    r: Float[Tensor, "#head panel node #src"]
    slope: Float[Tensor, "#head panel node #src"]
    along_k: Float[Tensor, "head panel node src"]
    along_q: Float[Tensor, "head panel node src"]

    def contributions(self, gradient: Float[Tensor, "head panel node d_head"]) -> Float[Tensor, "head panel node src"]:
        """See the base class."""
        path, panels = self.path, self.panels
        line, step = self._at_values(gradient)
        below = -(gradient * (self.displacement + panels.of_own(path.v_start))).sum(-1, keepdim=True)
        if path.score.sink is not None:
            below = below + (gradient * path.b_v[:, None]).sum(-1, keepdim=True)
        above = torch.addcmul(below, line, self.r).mul_(self.pattern)
        by_query = torch.linalg.vecdot(above, self.along_q)
        result = above.mul_(self.along_k)
        result.addcmul_(step, self.weights)
        return result.scatter_add_(-1, panels.dst[..., None, None].expand(*result.shape[:-1], 1), by_query[..., None])

    def messages(self, gradient: Float[Tensor, "head panel node d_head"]) -> Float[Tensor, "head panel node src"]:
        """`<g_j, d(p_ji v_i)/da>`: how each message moves along the path, all tokens together.

        Over the sources it adds up to what `contributions` does. Arguments as there.
        """
        line, step = self._at_values(gradient)
        values = torch.addcmul((gradient * self.path.b_v[:, None]).sum(-1, keepdim=True), line, self.r)
        along = self.along_k + self.along_q
        along -= torch.linalg.vecdot(self.pattern, along)[..., None]
        return along.mul_(self.pattern).mul_(values).addcmul_(step, self.weights)

    def _at_values(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """With V homogeneous: `g.V_i`, and `g.dv_i / r`: [head panel node src] each."""
        path = self.path
        v = [values[:, : self.panels.n_src].mT for values in path.v]
        ends = [torch.empty(0) if path.from_zero else path.each(gradient, v[0]), path.each(gradient, v[1])]
        line = path.between(ends, self.panels.a[..., None])
        return line, torch.addcmul(path.step(ends), line, self.slope)
