"""What attention does along a path, in closed form: where z is, and what each source contributes to a scalar of it.

Attention is `u_j = sum_i p_ji v_i` with `p = softmax(s)`. For a scalar with gradient g_j at u_j, source i gets

    c_ji = p_ji [ds_ji (g_j.v_i - g_j.u_j) + g_j.dv_i],    d for the derivative along source i's own path,

and where the query moves too, the destination's own source also `sum_k p_jk (dq_j.k_k) (g_j.v_k - g_j.u_j)`
(docs/method.md, where every line is derived). All sources, heads and destinations together cost a few
attention-sized matrix products per node of the rule, and no automatic differentiation.

Scores may be capped, `s = cap(x)`, and then ds = cap'(x) dx; where a sink takes part in the softmax, p adds up to less
than 1 and the same formula holds. Norms divide vectors by numbers r = 1 / sigma of their own (`panels.py`), those of
queries and keys by others than those of values; scores are `scores.py`'s. Tensors are laid out as `panels.py` says.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lig_lens.blocks.divisor import Tokens
from lig_lens.blocks.formula import FormulaValues
from lig_lens.blocks.pairing import per_query_head
from lig_lens.integrate.panels import Panels
from lig_lens.integrate.scores import OwnScores, OwnScoresAt, SharedScores, Way, each

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
            points = a[part].to(self.bias.dtype).to(self.dst.device)
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


class OwnPaths(AttentionPath):
    """ITB: every source goes from the destination's own residual to its own, one set of paths per destination.

    The query rests. With K and V homogeneous keys and values, the key of source i on the path of destination j is
    `r ((1 - a) K_j + a K_i) + b` at the place of i, `r = 1 / sigma_ij(a)`, and the same holds for values. sigma
    follows from products of tokens alone, so nothing is evaluated once per pair and node but numbers.
    """

    def __init__(self, values: FormulaValues, dst: Int[Tensor, "dst"]) -> None:
        super().__init__(values, dst)
        v = values.end.v.vectors
        self.scores = OwnScores(values, dst)
        self.of_v = self.scores.divisor(values.end.v.of)
        self.v, self.v_and_minus = v, torch.cat([v, -torch.ones_like(v[..., :1])], -1).mT
        self.own_v, self.b_v = self.per_head(v)[:, dst], self.per_head(self.formula.b_v)
        self.r_own = self.of_v.end(v)[:, dst].expand(self.n_heads, -1, -1)
        # What the sink leaves of the pattern at the start, where all sources have the destination's own value.
        self.mass = torch.ones_like(self.r_own)
        if self.score.sink is not None:
            for panels in self.starts(self.own_v.numel()):
                self.mass[panels.heads, panels.own] = self.scores.at(panels).pattern.sum(-1)
        self.z_start = self.mass * (self.own_v * self.r_own + self.b_v)

    def move(self, panels: Panels) -> "OwnMoved":
        """See the base class."""
        a = panels.a[..., None]
        scores = self.scores.at(panels)
        pattern, (r, slope) = scores.pattern, scores.divided(self.of_v)
        own, r_own = panels.of_own(self.own_v), panels.of_own(self.r_own)
        kept = panels.of_own(self.mass)
        shift = None if self.score.sink is None else (pattern.sum(-1, keepdim=True) - kept) * self.b_v[:, None]
        weights = pattern.mul_(r)
        summed, total = each(weights, self.v[:, : panels.n_src]), weights.sum(-1, keepdim=True)
        displacement = a * (summed - total * own) + (total - kept * r_own) * own
        if shift is not None:
            displacement += shift
        return OwnMoved(panels, displacement, self, scores, weights, r, slope, own)


@dataclass(frozen=True)
class OwnMoved(Moved):
    """What `OwnPaths.move` keeps."""

    path: OwnPaths
    scores: OwnScoresAt
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
        values = each(torch.cat([gradient, along_own], -1), path.v_and_minus[..., : panels.n_src])
        line = torch.addcmul(along_own, a, values)
        above = torch.addcmul(rest, line, self.r)
        result = self.scores.along(self.r).mul_(above).add_(values).addcmul_(line, self.slope).mul_(self.weights)
        # A source that does not move contributes nothing, rounding included.
        return result.scatter_(-1, panels.dst[..., None, None].expand(*result.shape[:-1], 1), 0.0)


class SharedPath(AttentionPath):
    """One path for all destinations (zero, corrupted, a tensor): queries, keys and values move token by token.

    Homogeneous queries, keys and values are on straight lines from start to end, so no query or key is evaluated at a
    node, and values at both ends are enough.
    """

    def __init__(self, values: FormulaValues, dst: Int[Tensor, "dst"], start: Tokens) -> None:
        super().__init__(values, dst)
        self.scores = SharedScores(values, dst, start)
        self.v = Way.of(start.v.vectors, values.end.v.vectors)
        self.of_v = self.scores.divisor(start.v.of, values.end.v.of)
        self.b_v = self.per_head(self.formula.b_v)
        # Values without their bias, which drops out of every difference, but for what a sink takes.
        self.v_start = torch.zeros_like(self.per_head(values.end.v.vectors)[:, dst])
        if not self.v.from_zero or self.score.sink is not None:
            for panels in self.starts(self.v_start.numel()):
                self.v_start[:, panels.own[0]] = self.move(panels).displacement[:, :, 0]
        self.z_start = self.v_start + self.b_v if self.score.sink is None else self.v_start

    def move(self, panels: Panels) -> "SharedMoved":
        """See the base class."""
        scores = self.scores.at(panels)
        pattern, (r, slope) = scores.pattern, scores.sources(self.of_v)
        weights = pattern * r
        ends = [each(weights, one[:, : panels.n_src]) for one in self.v.ends]
        displacement = self.v.between(ends, panels.a[..., None]) - panels.of_own(self.v_start)
        if self.score.sink is not None:
            displacement += pattern.sum(-1, keepdim=True) * self.b_v[:, None]
        return SharedMoved(panels, displacement, self, pattern, weights, r, slope, scores.along_k, scores.along_q)


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
        ends = [each(gradient, one[:, : self.panels.n_src].mT) for one in path.v.ends]
        line = path.v.between(ends, self.panels.a[..., None])
        return line, torch.addcmul(path.v.step(ends), line, self.slope)
