"""What attention does along a path, in closed form: where z is, and what each source contributes to a scalar of it.

Attention is `u_j = sum_i p_ji v_i` with `p = softmax(s)`. For a scalar with gradient g_j at u_j, source i gets

    c_ji = p_ji [ds_ji (g_j.v_i - g_j.u_j) + g_j.dv_i],    d for the derivative along source i's own path,

and where the query moves too, the destination's own source also `sum_k p_jk (dq_j.k_k) (g_j.v_k - g_j.u_j)`
(docs/method.md, where every line is derived). All sources, heads and destinations together cost a few
attention-sized matrix products per node of the rule, and no automatic differentiation.

Tensors are laid out `[head, panel, node, ...]`: a panel belongs to one destination, and its nodes are points on
that destination's path.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lig_lens.formula import Formula, Tokens

# Heads are worked on one by one where fewer than this share of (panel, head) pairs are asked for.
_SPARSE = 0.5


@dataclass
class Panels:
    """Points on paths that are worked on together.

    Attributes:
        rows: which of the panels that were asked for these are.
        dst: destination of each.
        a: points on its path.
        n_src: number of sources that any of them can see.
        heads: heads that are worked on; `kv_heads` serve them.
        state: what the path keeps from `move` for `contributions`.
    """

    rows: Int[Tensor, "panel"]
    dst: Int[Tensor, "panel"]
    a: Float[Tensor, "panel node"]
    n_src: int
    heads: slice
    kv_heads: slice
    state: dict[str, Tensor] = field(default_factory=dict)


class AttentionPath(ABC):
    """A path of residual vectors through one block's attention.

    `z_start` are the head outputs of each destination at the start of its path.
    """

    z_start: Float[Tensor, "head pos d_head"]

    def __init__(self, formula: Formula) -> None:
        self.formula = formula
        self.n_heads, self.n_kv_heads = len(formula.end.q), len(formula.end.k)
        self.d_model = formula.end.centred.shape[-1]
        self.b_k = formula.turn(formula.b_k.expand_as(formula.end.k))
        seen = torch.isfinite(formula.bias).any(0).cpu()
        self._n_seen = (seen * torch.arange(1, seen.shape[-1] + 1)).amax(-1)

    def work(
        self, dst: Int[Tensor, "panel"], a: Float[Tensor, "panel node"], groups: Bool[Tensor, "panel group"], size: int
    ) -> Iterator[Panels]:
        """Portions of the panels that fit into `size` numbers per tensor, destinations close together.

        All of `dst`, `a` and `groups` are on the CPU, so nothing here waits for a device. With one column of groups
        all heads are worked on together; with one for each head, heads that few panels ask for go alone.
        """
        device, dtype = self.b_k.device, self.b_k.dtype
        everything = slice(None), slice(None)
        for together in self._together(dst, a):
            tokens = self._at(a[together[0]].to(device, dtype))
            wanted = groups[together]
            rectangles = [(together, everything)]
            if wanted.shape[1] > 1 and float(wanted.float().mean()) < _SPARSE:
                share = self.n_heads // self.n_kv_heads
                rectangles = [
                    (together[wanted[:, h]], (slice(h, h + 1), slice(h // share, h // share + 1)))
                    for h in wanted.any(0).nonzero()[:, 0].tolist()
                ]
            for rows, (heads, kv_heads) in rectangles:
                n_heads = len(range(self.n_heads)[heads])
                step = max(1, size // (n_heads * a.shape[1] * len(self._n_seen)))
                for part in torch.split(rows, step):
                    n_src = int(self._n_seen[dst[part]].max())
                    own_dst, own_a = dst[part].to(device), a[part].to(dtype).to(device)
                    yield Panels(part.to(device), own_dst, own_a, n_src, heads, kv_heads, dict(tokens))

    @abstractmethod
    def _together(self, dst: Int[Tensor, "panel"], a: Float[Tensor, "panel node"]) -> Iterator[Int[Tensor, "part"]]:
        """Panels that can be worked on together, sorted by destination."""

    @abstractmethod
    def _at(self, a: Float[Tensor, "node"]) -> dict[str, Tensor]:
        """What panels that are worked on together share."""

    @abstractmethod
    def move(self, panels: Panels) -> Float[Tensor, "head panel node d_head"]:
        """How far z has moved from the start of the path."""

    @abstractmethod
    def contributions(
        self,
        panels: Panels,
        displacement: Float[Tensor, "head panel node d_head"],
        gradient: Float[Tensor, "head panel node d_head"],
    ) -> Float[Tensor, "head panel node src"]:
        """`<x_i - x0_i, dL/dx_i>` through attention at the points that `move` was called for last.

        Args:
            panels: the points; their state is used up.
            displacement: what `move` gave for them.
            gradient: of L, at z.
        """

    def _bias(self, panels: Panels) -> Float[Tensor, "#head panel src"]:
        bias = self.formula.bias
        return (bias if len(bias) == 1 else bias[panels.heads])[:, panels.dst, : panels.n_src]


def _grouped(vectors: Float[Tensor, "head *rows dim"], n_kv: int) -> Float[Tensor, "kv_head row dim"]:
    """Rows of all heads that share a key-value head, one below the other."""
    return vectors.reshape(n_kv, -1, vectors.shape[-1])


class OwnPaths(AttentionPath):
    """ITB: every source goes from the destination's own residual to its own, one set of paths per destination.

    The query rests. With K and V homogeneous keys and values, the key of source i on the path of destination j is
    `r ((1 - a) K_j + a K_i) + b` at the place of i, `r = 1 / sigma_ij(a)`, and the same holds for values. sigma
    follows from products of residuals alone, so nothing is evaluated once per pair and node but numbers.
    """

    def __init__(self, formula: Formula) -> None:
        super().__init__(formula)
        end = formula.end
        self.products = end.centred @ end.centred.T / self.d_model
        own = self.products.diagonal() + formula.eps
        self.r_own = torch.ones_like(own) if formula.norm == "none" else own.rsqrt()
        q = end.q * self.r_own[:, None] + formula.b_q
        self.q = formula.scale * formula.turn(q)
        self.k, self.v = formula.turn(end.k), end.v
        one = torch.ones_like(self.v[..., :1])
        self.v_and_one, self.v_and_minus = torch.cat([self.v, one], -1), torch.cat([self.v, -one], -1)
        z_start = self.v * self.r_own[:, None] + formula.b_v
        self.z_start = z_start.repeat_interleave(self.n_heads // self.n_kv_heads, 0)

    def _together(self, dst: Int[Tensor, "panel"], a: Float[Tensor, "panel node"]) -> Iterator[Int[Tensor, "part"]]:
        yield torch.argsort(dst)

    def _at(self, a: Float[Tensor, "node"]) -> dict[str, Tensor]:
        return {}

    def _scores(self, panels: Panels) -> tuple[Tensor, Tensor, Tensor]:
        """`q_j.K_j` turned to the place of i, how far `q_j.K_i` is above it, and what does not move.

        [head panel src] each.
        """
        formula, kv, n_src = self.formula, panels.kv_heads, panels.n_src
        q = self.q[panels.heads][:, panels.dst]
        n_kv = len(self.k[kv])

        def against(k: Tensor) -> Tensor:
            return (_grouped(q, n_kv) @ k[kv][:, :n_src].transpose(-1, -2)).reshape(*q.shape[:2], n_src)

        own = formula.end.k[kv][:, panels.dst].repeat_interleave(len(q) // n_kv, 0)
        if formula.rotary is None:
            at_start = (q * own).sum(-1, keepdim=True)
        else:
            rotary = formula.rotary
            n_pairs = rotary.cos.shape[-1]
            first, second, rest = rotary.split(own)
            q1, q2, q_rest = q[..., :n_pairs], q[..., n_pairs : 2 * n_pairs], q[..., 2 * n_pairs :]
            # In q.turn(k) the cos and sin of the place of i stand apart from what belongs to j.
            factors = torch.cat([q1 * first + q2 * second, q2 * first - q1 * second], -1)
            tables = torch.cat([rotary.cos, rotary.sin], -1)[:n_src]
            at_start = factors @ tables.T + (q_rest * rest).sum(-1, keepdim=True)
        return at_start, against(self.k) - at_start, against(self.b_k) + self._bias(panels)

    def _norms(self, panels: Panels) -> tuple[Tensor, Tensor]:
        """Of every pair of destination and source, r = 1 / sigma and (dr / da) / r: [panel node src]."""
        a = panels.a[..., None]
        if self.formula.norm == "none":
            return torch.ones_like(a), torch.zeros_like(a)
        cross = self.products[panels.dst, None, : panels.n_src]
        start = self.products.diagonal()[panels.dst][:, None, None]
        end = self.products.diagonal()[: panels.n_src]
        half_slope = torch.addcmul((a - 1) * start, 1 - 2 * a, cross).addcmul_(a, end)
        square = torch.addcmul((1 - a) ** 2 * start + self.formula.eps, 2 * a * (1 - a), cross).addcmul_(a * a, end)
        r = square.rsqrt()
        return r, half_slope.mul_(r).mul_(r).neg_()

    def move(self, panels: Panels) -> Float[Tensor, "head panel node d_head"]:
        """See the base class."""
        kv, a = panels.kv_heads, panels.a[..., None]
        at_start, rise, fixed = self._scores(panels)
        r, slope = self._norms(panels)
        line = torch.addcmul(at_start[:, :, None], a, rise[:, :, None])
        weights = torch.addcmul(fixed[:, :, None], line, r).softmax(-1).mul_(r)
        n_kv = len(self.v[kv])
        summed = _grouped(weights, n_kv) @ self.v_and_one[kv][:, : panels.n_src]
        summed = summed.reshape(*weights.shape[:-1], -1)
        own = self.v[kv][:, panels.dst, None].repeat_interleave(len(weights) // n_kv, 0)
        total, r_own = summed[..., -1:], self.r_own[panels.dst][:, None, None]
        panels.state |= {"line": line, "rise": rise, "weights": weights, "r": r, "slope": slope, "own": own}
        return a * (summed[..., :-1] - total * own) + (total - r_own) * own

    def contributions(
        self,
        panels: Panels,
        displacement: Float[Tensor, "head panel node d_head"],
        gradient: Float[Tensor, "head panel node d_head"],
    ) -> Float[Tensor, "head panel node src"]:
        """See the base class."""
        s, kv, a = panels.state, panels.kv_heads, panels.a[..., None]
        along_own = (gradient * s["own"]).sum(-1, keepdim=True)
        rest = -(gradient * displacement).sum(-1, keepdim=True) - self.r_own[panels.dst][:, None, None] * along_own
        both = _grouped(torch.cat([gradient, along_own], -1), len(self.v[kv]))
        # g.(V_i - V_j), and from it g.v_i / r and g.v_i - g.u_j
        values = (both @ self.v_and_minus[kv][:, : panels.n_src].transpose(-1, -2)).reshape(s["weights"].shape)
        line = torch.addcmul(along_own, a, values)
        above = torch.addcmul(rest, line, s["r"])
        result = torch.addcmul(s["rise"][:, :, None], s["line"], s["slope"])  # ds / r
        result = result.mul(above).add_(values).addcmul_(line, s["slope"]).mul_(s["weights"])
        # A source that does not move contributes nothing, rounding included.
        result[:, torch.arange(len(panels.dst), device=a.device), :, panels.dst] = 0
        return result


class SharedPath(AttentionPath):
    """One path for all destinations (zero, corrupted, a tensor): queries, keys and values move token by token."""

    def __init__(self, formula: Formula, start: Tokens) -> None:
        super().__init__(formula)
        end = formula.end
        pairs = ((start.centred, start.centred), (start.centred, end.centred), (end.centred, end.centred))
        self.products = torch.stack([(x * y).sum(-1) for x, y in pairs]) / self.d_model
        share = self.n_heads // self.n_kv_heads
        self.ends = {
            "q": tuple(formula.scale * formula.turn(tokens.q) for tokens in (start, end)),
            "k": tuple(formula.turn(tokens.k).repeat_interleave(share, 0) for tokens in (start, end)),
            "v": tuple(tokens.v.repeat_interleave(share, 0) for tokens in (start, end)),
        }
        self.biases = {
            "q": formula.scale * formula.turn(formula.b_q.expand_as(end.q)),
            "k": self.b_k.repeat_interleave(share, 0),
        }
        # Values without their bias, which drops out of every difference.
        self._v_start = torch.zeros_like(end.q)
        everywhere = torch.arange(end.q.shape[1])
        origin, all_heads = torch.zeros(len(everywhere), 1), torch.ones(len(everywhere), 1, dtype=torch.bool)
        for panels in self.work(everywhere, origin, all_heads, end.q.numel()):
            self._v_start[:, panels.dst] = self.move(panels)[:, :, 0]
        self.z_start = self._v_start + formula.b_v.repeat_interleave(share, 0)

    def _together(self, dst: Int[Tensor, "panel"], a: Float[Tensor, "panel node"]) -> Iterator[Int[Tensor, "part"]]:
        """Panels with the same points share queries, keys and values."""
        _, points = torch.unique(a, dim=0, return_inverse=True)
        order = torch.argsort(points * len(self._n_seen) + dst)
        _, counts = torch.unique_consecutive(points[order], return_counts=True)
        yield from torch.split(order, counts.tolist())

    def _at(self, a: Float[Tensor, "node"]) -> dict[str, Tensor]:
        """Queries, keys and values at `a` and their derivatives dq, dk, dv: [head node pos d_head]."""
        x = a[:, None]
        r, slope = torch.ones_like(x), torch.zeros_like(x)
        if self.formula.norm != "none":
            first, cross, last = self.products
            r = ((1 - x) ** 2 * first + 2 * x * (1 - x) * cross + x * x * last + self.formula.eps).rsqrt()
            slope = -((x - 1) * first + (1 - 2 * x) * cross + x * last) * r * r
        r, slope, x = r[..., None], slope[..., None], x[..., None]
        result = {}
        for name, (start, end) in self.ends.items():
            start, end = start[:, None], end[:, None]
            line = torch.lerp(start, end, x)
            result[f"d{name}"] = r * (end - start + slope * line)
            result[name] = r * line
            if name in self.biases:
                result[name] += self.biases[name][:, None]
        return result

    def move(self, panels: Panels) -> Float[Tensor, "head panel node d_head"]:
        """See the base class."""
        s = panels.state
        heads, sources = panels.heads, slice(panels.n_src)
        for name in ("q", "dq"):
            s[name] = s[name][heads][:, :, panels.dst]
        for name in ("k", "dk", "v", "dv"):
            s[name] = s[name][heads][:, :, sources]
        scores = s["q"] @ s["k"].transpose(-1, -2)
        s["pattern"] = scores.add_(self._bias(panels)[:, None]).softmax(-1)
        s["z"] = s["pattern"] @ s["v"]
        return (s["z"] - self._v_start[heads][:, None, panels.dst]).transpose(1, 2)

    def contributions(
        self,
        panels: Panels,
        displacement: Float[Tensor, "head panel node d_head"],
        gradient: Float[Tensor, "head panel node d_head"],
    ) -> Float[Tensor, "head panel node src"]:
        """See the base class."""
        s, gradient = panels.state, gradient.transpose(1, 2)
        above = gradient @ s["v"].transpose(-1, -2) - (gradient * s["z"]).sum(-1, keepdim=True)
        above.mul_(s["pattern"])
        by_query = (s["dq"] * (above @ s["k"])).sum(-1)
        result = (gradient @ s["dv"].transpose(-1, -2)).mul_(s["pattern"])
        result.addcmul_(above, s["q"] @ s["dk"].transpose(-1, -2))
        result[:, :, torch.arange(len(panels.dst), device=result.device), panels.dst] += by_query
        return result.transpose(1, 2)
