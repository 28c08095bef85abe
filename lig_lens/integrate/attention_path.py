"""What attention does along a path, in closed form: where z is, and what each source contributes to a scalar of it.

Attention is `u_j = sum_i p_ji v_i` with `p = softmax(s)`. For a scalar with gradient g_j at u_j, source i gets

    c_ji = p_ji [ds_ji (g_j.v_i - g_j.u_j) + g_j.dv_i],    d for the derivative along source i's own path,

and where the query moves too, the destination's own source also `sum_k p_jk (dq_j.k_k) (g_j.v_k - g_j.u_j)`
(docs/method.md, where every line is derived). All sources, heads and destinations together cost a few
attention-sized matrix products per node of the rule, and no automatic differentiation.

Tensors are laid out `[head, panel, node, ...]`: a panel belongs to one destination, and its nodes are points on
that destination's path. Where heads ask for different panels, each has its own list, and what depends on nothing
but the panel has a head axis too; else that axis has length 1.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lig_lens.blocks.formula import FormulaValues, Tokens, per_query_head

# Heads get lists of their own where the longest of them is shorter than this share of all panels.
_OWN_LISTS = 0.7


@dataclass
class Panels:
    """Points on paths that are worked on together.

    Attributes:
        rows: which of the panels that were asked for these are.
        own: number of the destination of each.
        dst: its position.
        a: points on its path.
        n_src: number of sources that any of them can see.
    """

    rows: Int[Tensor, "#head panel"]
    own: Int[Tensor, "#head panel"]
    dst: Int[Tensor, "#head panel"]
    a: Float[Tensor, "#head panel node"]
    n_src: int


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
        self.formula, self.dst = values.formula, dst
        self.n_heads, self.n_kv_heads = self.formula.n_heads, self.formula.n_kv_heads
        self.heads = torch.arange(self.n_heads, device=dst.device)[:, None]
        self.bias = values.bias[:, dst]
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
            yield Panels(part.to(self.dst.device), on_device, self.dst[on_device], points, n_src)
            start = stop

    @abstractmethod
    def move(self, panels: Panels) -> Moved:
        """Attention at the points of `panels`."""

    def per_head(self, kv: Float[Tensor, "kv_head rest dim"]) -> Float[Tensor, "head rest dim"]:
        """What key-value heads have, once for each head that shares them."""
        return per_query_head(kv, self.n_heads)

    def pick(self, table: Float[Tensor, "#head dst src"], panels: Panels) -> Float[Tensor, "#head panel 1 seen"]:
        """Rows of a table of destinations and sources, for the destinations and sources of `panels`."""
        heads = self.heads if len(table) > 1 else self.heads[:1]
        return table[..., : panels.n_src][heads, panels.own][:, :, None]

    def own(self, vectors: Float[Tensor, "head dst d_head"], panels: Panels) -> Float[Tensor, "head panel 1 d_head"]:
        """What belongs to the destinations of `panels`."""
        return vectors[self.heads, panels.own][:, :, None]

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
    follows from products of residuals alone, so nothing is evaluated once per pair and node but numbers.
    """

    def __init__(self, values: FormulaValues, dst: Int[Tensor, "dst"]) -> None:
        super().__init__(values, dst)
        formula, end = self.formula, values.end
        products = end.centred @ end.centred.T / end.centred.shape[-1]
        self.size, self.cross = products.diagonal(), products[dst]
        self.r_own = torch.ones_like(self.size) if formula.norm == "none" else (self.size + formula.eps).rsqrt()
        q = formula.scale * values.turn(end.q * self.r_own[:, None] + formula.b_q)[:, dst]
        self.at_start = self._at_start(values, q)
        self.rise = self.each(q, values.turn(end.k).mT) - self.at_start
        self.fixed = self.each(q, self.b_k.mT) + self.bias
        self.v, self.v_and_minus = end.v, torch.cat([end.v, -torch.ones_like(end.v[..., :1])], -1).mT
        self.own_v, self.r_own = self.per_head(end.v)[:, dst], self.r_own[dst]
        self.z_start = self.own_v * self.r_own[:, None] + self.per_head(formula.b_v)

    def _at_start(self, values: FormulaValues, q: Float[Tensor, "head dst d_head"]) -> Float[Tensor, "head dst src"]:
        """`q_j.K_j` turned to the place of every source."""
        own, rotary = self.per_head(values.end.k[:, self.dst]), values.rotary
        if rotary is None:
            return (q * own).sum(-1, keepdim=True).expand(-1, -1, len(self.size))
        n_pairs = rotary.cos.shape[-1]
        first, second, rest = rotary.split(own)
        q1, q2, q_rest = q[..., :n_pairs], q[..., n_pairs : 2 * n_pairs], q[..., 2 * n_pairs :]
        # In q.turn(k) the cos and sin of the place of i stand apart from what belongs to j.
        factors = torch.cat([q1 * first + q2 * second, q2 * first - q1 * second], -1)
        tables = torch.cat([rotary.cos, rotary.sin], -1)
        return factors @ tables.T + (q_rest * rest).sum(-1, keepdim=True)

    def _norms(self, panels: Panels) -> tuple[Tensor, Tensor]:
        """Of every pair of destination and source, r = 1 / sigma and (dr / da) / r: [#head panel node src]."""
        a = panels.a[..., None]
        if self.formula.norm == "none":
            return torch.ones_like(a), torch.zeros_like(a)
        cross = self.cross[:, : panels.n_src][panels.own][:, :, None]
        start, end = self.size[panels.dst][..., None, None], self.size[: panels.n_src]
        rest = 1 - a
        square = torch.addcmul(rest * rest * start + self.formula.eps, 2 * a * rest, cross).addcmul_(a * a, end)
        r = square.clamp_(min=self.formula.eps).rsqrt()
        fall = torch.addcmul(rest * start, a - rest, cross).addcmul_(a, end, value=-1)
        return r, fall.mul_(r).mul_(r)

    def move(self, panels: Panels) -> "OwnMoved":
        """See the base class."""
        a = panels.a[..., None]
        rise, (r, slope) = self.pick(self.rise, panels), self._norms(panels)
        line = torch.addcmul(self.pick(self.at_start, panels), a, rise)
        weights = torch.addcmul(self.pick(self.fixed, panels), line, r).softmax(-1).mul_(r)
        summed, total = self.each(weights, self.v[:, : panels.n_src]), weights.sum(-1, keepdim=True)
        own, r_own = self.own(self.own_v, panels), self.r_own[panels.own][..., None, None]
        displacement = a * (summed - total * own) + (total - r_own) * own
        return OwnMoved(panels, displacement, self, line, rise, weights, r, slope, own)


@dataclass(frozen=True)
class OwnMoved(Moved):
    """What `OwnPaths.move` keeps: scores are `r line + fixed`, and `line` rises by `rise`."""

    path: OwnPaths
    line: Float[Tensor, "head panel node src"]
    rise: Float[Tensor, "head panel 1 src"]
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
        rest = -(gradient * self.displacement).sum(-1, keepdim=True)
        rest = rest - path.r_own[panels.own][..., None, None] * along_own
        # g.(V_i - V_j), and from it g.v_i / r and g.v_i - g.u_j
        values = path.each(torch.cat([gradient, along_own], -1), path.v_and_minus[..., : panels.n_src])
        line = torch.addcmul(along_own, a, values)
        above = torch.addcmul(rest, line, self.r)
        result = torch.addcmul(self.rise, self.line, self.slope)  # ds / r
        result = result.mul_(above).add_(values).addcmul_(line, self.slope).mul_(self.weights)
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
        # sigma^2 = steep (a - nearest)^2 + least + eps: no differences of large numbers where a path passes near 0.
        step = end.centred - start.centred
        self.steep = step.square().mean(-1)
        along = (start.centred * step).mean(-1)
        self.nearest = torch.where(self.steep > 0, -along / self.steep, 0.0)
        self.least = (start.centred + self.nearest[:, None] * step).square().mean(-1)
        b_q = formula.scale * values.turn(formula.b_q.expand_as(end.q))
        q = [formula.scale * values.turn(tokens.q) for tokens in (start, end)]
        k = [values.turn(tokens.k) for tokens in (start, end)]
        if formula.norm == "none":  # what no norm divides can stand with its bias
            q, k = [x + b_q for x in q], [x + self.b_k for x in k]
            b_q, b_k = torch.zeros_like(b_q), torch.zeros_like(self.b_k)
        else:
            b_k = self.b_k
        self.from_zero = not bool(torch.stack([x.any() for x in (*q[:1], *k[:1], start.v)]).any())
        q, b_q = [x[:, dst] for x in q], b_q[:, dst]
        self.products_qk = [[self.each(x, y.mT) for y in k] for x in q]
        self.products_q = [self.each(x, b_k.mT) for x in q] if bool(b_k.any()) else None
        self.products_k = [self.each(b_q, y.mT) for y in k] if bool(b_q.any()) else None
        self.fixed = self.bias + self.each(b_q, b_k.mT) if bool(b_q.any() & b_k.any()) else self.bias
        self.v = (start.v, end.v)
        # Values without their bias, which drops out of every difference.
        self.v_start = torch.zeros_like(q[0])
        if not self.from_zero:
            for panels in self.work(torch.arange(len(dst)), torch.zeros(len(dst), 1), None, q[0].numel()):
                self.v_start[:, panels.own[0]] = self.move(panels).displacement[:, :, 0]
        self.z_start = self.v_start + self.per_head(formula.b_v)

    def between(self, ends: Sequence[Tensor], a: Tensor) -> Tensor:
        """A point on the line between two ends; lines from 0 cost less."""
        return a * ends[1] if self.from_zero else torch.lerp(ends[0], ends[1], a)

    def step(self, ends: Sequence[Tensor]) -> Tensor:
        """From one end to the other."""
        return ends[1] if self.from_zero else ends[1] - ends[0]

    def _norms(
        self, a: Float[Tensor, "#head panel node 1"], token: Int[Tensor, "..."] | slice
    ) -> tuple[Tensor, Tensor]:
        """R = 1 / sigma and (dr / da) / r of the tokens: [#head panel node token]."""
        if self.formula.norm == "none":
            return torch.ones_like(a), torch.zeros_like(a)
        away, steep = a - self.nearest[token], self.steep[token]
        r = torch.addcmul(self.least[token] + self.formula.eps, steep, away * away).rsqrt()
        return r, -steep * away * r * r

    def move(self, panels: Panels) -> "SharedMoved":
        """See the base class."""
        a, n_src = panels.a[..., None], panels.n_src
        r_own, slope_own = self._norms(a, panels.dst[..., None, None])
        r, slope = self._norms(a, slice(n_src))
        qk = [[self.pick(table, panels) for table in row] for row in self.products_qk]
        by_k = [self.between((qk[0][i], qk[1][i]), a) for i in (0, 1)]  # at this query, both ends of the key
        by_q = [self.between(qk[i], a) for i in (0, 1)]
        line, both = self.between(by_k, a), r * r_own
        scores = torch.addcmul(self.pick(self.fixed, panels), line, both)
        # Derivatives of the scores along the keys' and along the query's path.
        along_k = torch.addcmul(self.step(by_k), line, slope).mul_(both)
        along_q = torch.addcmul(self.step(by_q), line, slope_own).mul_(both)
        if self.products_q is not None:
            ends = [self.pick(table, panels) for table in self.products_q]
            line = self.between(ends, a)
            scores.addcmul_(line, r_own)
            along_q.addcmul_(torch.addcmul(self.step(ends), line, slope_own), r_own)
        if self.products_k is not None:
            ends = [self.pick(table, panels) for table in self.products_k]
            line = self.between(ends, a)
            scores.addcmul_(line, r)
            along_k.addcmul_(torch.addcmul(self.step(ends), line, slope), r)
        pattern = scores.softmax(-1)
        weights = pattern * r
        ends = [torch.empty(0) if self.from_zero else self.each(weights, self.v[0][:, :n_src])]
        ends.append(self.each(weights, self.v[1][:, :n_src]))
        displacement = self.between(ends, a) - self.own(self.v_start, panels)
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
        at_z = (gradient * (self.displacement + path.own(path.v_start, panels))).sum(-1, keepdim=True)
        above = torch.addcmul(-at_z, line, self.r).mul_(self.pattern)
        by_query = torch.linalg.vecdot(above, self.along_q)
        result = above.mul_(self.along_k)
        result.addcmul_(step, self.weights)
        return result.scatter_add_(-1, panels.dst[..., None, None].expand(*result.shape[:-1], 1), by_query[..., None])

    def messages(self, gradient: Float[Tensor, "head panel node d_head"]) -> Float[Tensor, "head panel node src"]:
        """`<g_j, d(p_ji v_i)/da>`: how each message moves along the path, all tokens together.

        Over the sources it adds up to what `contributions` does. Arguments as there.
        """
        line, step = self._at_values(gradient)
        b_v = self.path.per_head(self.path.formula.b_v)[:, None]
        values = torch.addcmul((gradient * b_v).sum(-1, keepdim=True), line, self.r)
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
