"""Naive oracle: one transformer block written again in float64 torch, and Integrated Gradients by autograd.

Nothing here imports the package or TransformerLens, and no Hugging Face forward pass runs: only weights and
configuration numbers are read. Slow and simple on purpose: every destination gets its own copy of the path,
even where the baseline would let all of them share one, so that baselines differ in their start point only.

Words: z is the attention output per head before W_O, skip the residual stream that enters the block.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Map = Callable[[Tensor], Tensor]
Target = str | Tensor
Given = Tensor | None
DOUBLE = torch.float64
MAX_GAP = 1e-7
GELU_TANH = functools.partial(functional.gelu, approximate="tanh")


@dataclass(frozen=True)
class Block:
    """One block in float64. All methods take leading batch dimensions.

    `layout` orders norms and sums; a norm that the layout lacks is None. `w_q`, `w_k`, `w_v` are
    [query head, d_model, d_head] (grouped keys and values repeated), `w_o` is [head, d_head, d_model].
    """

    layout: str
    w_q: Tensor
    w_k: Tensor
    w_v: Tensor
    b_q: Tensor
    b_k: Tensor
    b_v: Tensor
    w_o: Tensor
    b_o: Tensor
    mlp: Map
    norm_1: Map
    norm_2: Map
    scale: float
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    rotate: Map | None = None
    norm_q: Map | None = None
    norm_k: Map | None = None
    norm_attn_out: Map | None = None
    norm_mlp_out: Map | None = None

    def pattern_of(self, resid_pre: Tensor) -> Tensor:
        """Attention pattern [..., head, dst (query), src (key)] of resid_pre [..., pos, d_model]."""
        x = self._attn_in(resid_pre)
        query = torch.einsum("...pd,hdk->...hpk", x, self.w_q) + self.b_q[:, None]
        key = torch.einsum("...pd,hdk->...hpk", x, self.w_k) + self.b_k[:, None]
        if self.norm_q is not None and self.norm_k is not None:
            query, key = self.norm_q(query), self.norm_k(key)
        if self.rotate is not None:
            query, key = self.rotate(query), self.rotate(key)
        scores = query @ key.transpose(-1, -2) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        return scores.masked_fill(~self.visible(x.shape[-2]), -math.inf).softmax(-1)

    def visible(self, n_pos: int) -> Tensor:
        """Which source (column) a destination (row) may look at; bool [dst, src]."""
        distance = torch.arange(n_pos)[:, None] - torch.arange(n_pos)
        if not self.causal:
            return torch.ones_like(distance, dtype=torch.bool)
        return (distance >= 0) & (distance < (self.window or n_pos))

    def values_of(self, resid_pre: Tensor) -> Tensor:
        """Value vectors [..., pos, head, d_head] of resid_pre [..., pos, d_model]."""
        return torch.einsum("...pd,hdk->...phk", self._attn_in(resid_pre), self.w_v) + self.b_v

    def z_of(self, resid_pre: Tensor) -> Tensor:
        """Head outputs before W_O [..., pos, head, d_head] of resid_pre [..., pos, d_model]."""
        return torch.einsum("...hjs,...shk->...jhk", self.pattern_of(resid_pre), self.values_of(resid_pre))

    def tail(self, z: Tensor, skip: Tensor, bias_scale: Tensor | float = 1.0) -> Tensor:
        """Rest of the block: resid_post [..., pos, d_model].

        Args:
            z: head outputs [..., pos, head, d_head].
            skip: residual stream entering the block [..., pos, d_model].
            bias_scale: multiplies b_O; a number, or [..., pos, 1].
        """
        attn_out = torch.einsum("...phk,hkd->...pd", z, self.w_o) + bias_scale * self.b_o
        if self.layout == "parallel":
            return skip + attn_out + self.mlp(self.norm_2(skip))
        if self.layout == "post_ln":
            mid = self.norm_1(skip + attn_out)
            return self.norm_2(mid + self.mlp(mid))
        if self.norm_attn_out is not None and self.norm_mlp_out is not None:
            mid = skip + self.norm_attn_out(attn_out)
            return mid + self.norm_mlp_out(self.mlp(self.norm_2(mid)))
        mid = skip + attn_out
        return mid + self.mlp(self.norm_2(mid))

    def run(self, resid_pre: Tensor) -> Tensor:
        """Give the whole block's resid_post [..., pos, d_model]."""
        return self.tail(self.z_of(resid_pre), resid_pre)

    def _attn_in(self, resid_pre: Tensor) -> Tensor:
        return resid_pre if self.layout == "post_ln" else self.norm_1(resid_pre)


def _layer_norm(weight: Tensor, bias: Tensor, eps: float) -> Map:
    def apply(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias

    return apply


def _rms_norm(weight: Tensor, eps: float) -> Map:
    return lambda x: x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _rotary(theta: float, n_rotated: int, interleaved: bool) -> Map:
    """Rotate the first `n_rotated` dimensions of [..., pos, d_head] by pos · theta^(−2k/n_rotated).

    Pair k is (2k, 2k + 1) if interleaved (GPT-J), else (k, k + n_rotated/2).
    """

    def apply(x: Tensor) -> Tensor:
        half = n_rotated // 2
        frequency = theta ** (-torch.arange(half, dtype=DOUBLE) / half)
        angle = torch.arange(x.shape[-2], dtype=DOUBLE)[:, None] * frequency
        turned, rest = x[..., :n_rotated], x[..., n_rotated:]
        first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.split(half, -1)
        pair = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
        turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
        return torch.cat([turned, rest], -1)

    return apply


def _two_layer_mlp(w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, activation: Map) -> Map:
    return lambda x: activation(x @ w_in.T + b_in) @ w_out.T + b_out


def _gated_mlp(w_gate: Tensor, w_up: Tensor, w_down: Tensor, activation: Map) -> Map:
    return lambda x: (activation(x @ w_gate.T) * (x @ w_up.T)) @ w_down.T


class _Weights:
    """The weights below one prefix of a state dict, in float64."""

    def __init__(self, state: dict[str, Tensor], prefix: str):
        self.values = {
            name.removeprefix(prefix): value.to(DOUBLE) for name, value in state.items() if name.startswith(prefix)
        }

    def __call__(self, *names: str) -> tuple[Tensor, ...]:
        return tuple(self.values[name] for name in names)

    def layer_norm(self, name: str, eps: float) -> Map:
        return _layer_norm(*self(f"{name}.weight", f"{name}.bias"), eps)

    def mlp(self, first: str, second: str, activation: Map) -> Map:
        return _two_layer_mlp(
            *self(f"{first}.weight", f"{first}.bias", f"{second}.weight", f"{second}.bias"), activation
        )


def _heads(
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    biases: tuple[Tensor, ...] | None,
    n_heads: int,
    n_kv_heads: int,
) -> dict[str, Tensor]:
    """Cut q, k, v, o weights, each [out, in], and their biases into heads."""
    (w_q, w_k, w_v, w_o), d_model = weights, weights[3].shape[0]
    d_head = w_q.shape[0] // n_heads
    if biases is None:
        biases = tuple(torch.zeros(w.shape[0], dtype=DOUBLE) for w in weights)
    parts: dict[str, Tensor] = {}
    for name, weight, bias in zip("qkv", (w_q, w_k, w_v), biases[:3], strict=True):
        per_head = weight.view(-1, d_head, d_model).transpose(1, 2)
        repeats = 1 if name == "q" else n_heads // n_kv_heads
        parts[f"w_{name}"] = per_head.repeat_interleave(repeats, 0)
        parts[f"b_{name}"] = bias.view(-1, d_head).repeat_interleave(repeats, 0)
    parts["w_o"] = w_o.T.reshape(n_heads, d_head, d_model)
    parts["b_o"] = biases[3]
    return parts


def _bert_block(state: dict[str, Tensor], config, layer: int) -> Block:
    w = _Weights(state, f"bert.encoder.layer.{layer}.")
    names = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    n_heads = config.num_attention_heads
    return Block(
        layout="post_ln",
        **_heads(w(*(f"{n}.weight" for n in names)), w(*(f"{n}.bias" for n in names)), n_heads, n_heads),
        mlp=w.mlp("intermediate.dense", "output.dense", functional.gelu),
        norm_1=w.layer_norm("attention.output.LayerNorm", config.layer_norm_eps),
        norm_2=w.layer_norm("output.LayerNorm", config.layer_norm_eps),
        scale=(config.hidden_size // n_heads) ** -0.5,
        causal=False,
    )


def _gpt2_block(state: dict[str, Tensor], config, layer: int) -> Block:
    w = _Weights(state, f"transformer.h.{layer}.")
    qkv, b_qkv = w("attn.c_attn.weight", "attn.c_attn.bias")
    w_o, b_o = w("attn.c_proj.weight", "attn.c_proj.bias")
    w_in, b_in, w_out, b_out = w("mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias")
    # GPT-2 keeps its matrices as [in, out].
    q, k, v = qkv.T.chunk(3)
    return Block(
        layout="pre_ln",
        **_heads((q, k, v, w_o.T), (*b_qkv.chunk(3), b_o), config.n_head, config.n_head),
        mlp=_two_layer_mlp(w_in.T, b_in, w_out.T, b_out, GELU_TANH),
        norm_1=w.layer_norm("ln_1", config.layer_norm_epsilon),
        norm_2=w.layer_norm("ln_2", config.layer_norm_epsilon),
        scale=(config.n_embd // config.n_head) ** -0.5,
    )


def _neox_block(state: dict[str, Tensor], config, layer: int) -> Block:
    w = _Weights(state, f"gpt_neox.layers.{layer}.")
    n_heads, d_model = config.num_attention_heads, config.hidden_size
    d_head = d_model // n_heads
    qkv, b_qkv = w("attention.query_key_value.weight", "attention.query_key_value.bias")
    # Rows are ordered head by head: its query, its key, its value.
    q, k, v = (part.reshape(d_model, d_model) for part in qkv.view(n_heads, 3, d_head, d_model).unbind(1))
    b_q, b_k, b_v = (part.reshape(d_model) for part in b_qkv.view(n_heads, 3, d_head).unbind(1))
    w_o, b_o = w("attention.dense.weight", "attention.dense.bias")
    rope = config.rope_parameters
    return Block(
        layout="parallel",
        **_heads((q, k, v, w_o), (b_q, b_k, b_v, b_o), n_heads, n_heads),
        mlp=w.mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", functional.gelu),
        norm_1=w.layer_norm("input_layernorm", config.layer_norm_eps),
        norm_2=w.layer_norm("post_attention_layernorm", config.layer_norm_eps),
        scale=d_head**-0.5,
        rotate=_rotary(rope["rope_theta"], int(d_head * rope["partial_rotary_factor"]), interleaved=False),
    )


def _gptj_block(state: dict[str, Tensor], config, layer: int) -> Block:
    w = _Weights(state, f"transformer.h.{layer}.")
    norm = w.layer_norm("ln_1", config.layer_norm_epsilon)
    weights = w(*(f"attn.{n}_proj.weight" for n in ("q", "k", "v", "out")))
    return Block(
        layout="parallel",
        **_heads(weights, None, config.n_head, config.n_head),
        mlp=w.mlp("mlp.fc_in", "mlp.fc_out", GELU_TANH),
        norm_1=norm,
        norm_2=norm,
        scale=(config.n_embd // config.n_head) ** -0.5,
        rotate=_rotary(10000.0, config.rotary_dim, interleaved=True),
    )


def _llama_block(state: dict[str, Tensor], config, layer: int) -> Block:
    """Llama, and Gemma 2 and 3, which add norms, a cap on the scores and a window."""
    w = _Weights(state, f"model.layers.{layer}.")
    gemma = config.model_type.startswith("gemma")
    kind_of_layer = config.layer_types[layer] if gemma else "full_attention"

    def norm(name: str) -> Map:
        (weight,) = w(f"{name}.weight")
        return _rms_norm(1 + weight if gemma else weight, config.rms_norm_eps)

    rope = config.rope_parameters
    theta = rope[kind_of_layer]["rope_theta"] if kind_of_layer in rope else rope["rope_theta"]
    gated = w("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
    weights = w(*(f"self_attn.{n}_proj.weight" for n in "qkvo"))
    per_head_norms = config.model_type.startswith("gemma3")
    return Block(
        layout="pre_post_ln" if gemma else "pre_ln",
        **_heads(weights, None, config.num_attention_heads, config.num_key_value_heads),
        mlp=_gated_mlp(*gated, GELU_TANH if gemma else functional.silu),
        norm_1=norm("input_layernorm"),
        norm_2=norm("pre_feedforward_layernorm" if gemma else "post_attention_layernorm"),
        scale=(config.query_pre_attn_scalar if gemma else config.head_dim) ** -0.5,
        window=config.sliding_window if kind_of_layer == "sliding_attention" else None,
        softcap=getattr(config, "attn_logit_softcapping", None),
        rotate=_rotary(theta, config.head_dim, interleaved=False),
        norm_q=norm("self_attn.q_norm") if per_head_norms else None,
        norm_k=norm("self_attn.k_norm") if per_head_norms else None,
        norm_attn_out=norm("post_attention_layernorm") if gemma else None,
        norm_mlp_out=norm("post_feedforward_layernorm") if gemma else None,
    )


_BUILDERS = {
    "bert": _bert_block,
    "gpt2": _gpt2_block,
    "gpt_neox": _neox_block,
    "gptj": _gptj_block,
    "llama": _llama_block,
    "gemma2": _llama_block,
    "gemma3_text": _llama_block,
}


def block_of(model: torch.nn.Module, layer: int) -> Block:
    """Read block `layer` out of a Hugging Face model's state dict and config."""
    return _BUILDERS[model.config.model_type](model.state_dict(), model.config, layer)


@functools.cache
def graded_rule(n_per_panel: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights on panels that shrink geometrically toward both ends of [0, 1].

    Down to 1e-20 at 0: a path from 0 crosses one boundary layer per norm, and each norm magnifies what the
    next one sees, so that a Gemma block (four norms in a row) has structure at 1e-12.
    """
    low = [0.0] + [10.0**-k for k in range(20, 0, -1)]
    middle = [k / 10 for k in range(2, 10)]
    high = [1 - 10.0**-k for k in range(2, 7)] + [1.0]
    edges = torch.tensor(low + middle + high, dtype=DOUBLE)
    # Golub-Welsch: the nodes are the eigenvalues of the Legendre recurrence's Jacobi matrix.
    k = torch.arange(1, n_per_panel, dtype=DOUBLE)
    off = k / (4 * k**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    weights = 2 * vectors[0].square()
    width = edges.diff()[:, None]
    return (edges[:-1, None] + width * (nodes + 1) / 2).flatten(), (width * weights / 2).flatten()


def naive_ig(
    forward: Callable[..., Tensor], start: Sequence[Tensor], end: Sequence[Tensor], scalar: Map
) -> tuple[list[Tensor], float]:
    """Integrated Gradients along the straight path from `start` to `end`, jointly in all inputs.

    The nodes per panel double until every cell is complete.

    Args:
        forward: takes each input with a leading dimension `node`, gives the output y.
        start: inputs at a = 0, each [path, ...]; paths do not see each other.
        end: inputs at a = 1.
        scalar: from y(a) − y(0) to L [node, path, cell].

    Returns:
        per input, (end − start) · ∫ ∂L/∂input da, elementwise, [cell, path, ...]; and the largest
        completeness gap, relative to L(1), or to 1e-3 of the largest L(1) for cells whose own is smaller.

    Raises:
        AssertionError: some cell misses L(1) by more than MAX_GAP however many nodes.
    """
    with torch.no_grad():
        y_start = forward(*(first[None] for first in start))
        total = scalar(forward(*(last[None] for last in end)) - y_start)[0]
    scale = total.abs().clamp(min=max(1e-3 * total.abs().max().item(), 1e-300))
    moves = [last - first for first, last in zip(start, end, strict=True)]
    gap = math.inf
    for n_per_panel in (8, 16, 32, 64):
        nodes, weights = graded_rule(n_per_panel)
        points = [
            (first + nodes.view(-1, *[1] * first.ndim) * move).requires_grad_()
            for first, move in zip(start, moves, strict=True)
        ]
        values = scalar(forward(*points) - y_start)
        per_cell = [
            torch.autograd.grad(values[..., cell].sum(), points, retain_graph=True) for cell in range(values.shape[-1])
        ]
        parts = [
            move * torch.stack([torch.einsum("n,n...->...", weights, grad) for grad in grads])
            for move, grads in zip(moves, zip(*per_cell, strict=True), strict=True)
        ]
        explained = sum(part.flatten(2).sum(2) for part in parts).T
        gap = ((explained - total).abs() / scale).max().item()
        if gap <= MAX_GAP:
            return parts, gap
    raise AssertionError(f"The oracle's own completeness gap is {gap:.1e}, above {MAX_GAP:.0e}.")


def attn_map(
    block: Block, x: Tensor, baseline: str, target: Target, x_corrupted: Given = None, tensor: Given = None
) -> Tensor:
    """Contribution of source i to head h's output at destination j; [head, src, dst].

    Args:
        block: the block.
        x: its resid_pre on the prompt [pos, d_model].
        baseline: 'zero', 'itb', 'itb_zero_ratio', 'itb_map_ratio', 'corrupted' or 'tensor'.
        target: 'l2', or a direction [d_model] or [pos, d_model], pulled back through W_O.
        x_corrupted: resid_pre of the same block on the other prompt.
        tensor: start point [pos, d_model] of baseline 'tensor'.
    """
    w, given = _direction(target, x), {"corrupted": x_corrupted, "tensor": tensor}
    pulled_back = None if w is None else torch.einsum("jd,hkd->jhk", w, block.w_o)
    return _token_map(block.z_of, block, x, baseline, pulled_back, given)


def block_map(
    block: Block, x: Tensor, baseline: str, target: Target, x_corrupted: Given = None, tensor: Given = None
) -> Tensor:
    """Contribution of source i to the block's output at destination j; [src, dst].

    Arguments as in `attn_map`; there is no 'itb_map_ratio', and no pull-back of a direction.
    """
    w, given = _direction(target, x), {"corrupted": x_corrupted, "tensor": tensor}
    single = None if w is None else w[:, None]

    def run(point: Tensor) -> Tensor:
        return block.run(point).unsqueeze(-2)

    return _token_map(run, block, x, baseline, single, given)[0]


def _token_map(
    outputs: Map, block: Block, x: Tensor, baseline: str, direction: Given, given: dict[str, Given]
) -> Tensor:
    """Contributions [head, src, dst] to outputs(resid_pre) [..., pos, head, d]; direction [dst, head, d].

    `given` holds the start points [pos, d_model] of the baselines 'corrupted' and 'tensor'.
    """
    if baseline.startswith("itb_"):
        columns = _token_map(outputs, block, x, "itb", direction, given)
        if baseline == "itb_zero_ratio":
            from_zero = _token_map(outputs, block, x, "zero", direction, given)
            own = from_zero.diagonal(dim1=-2, dim2=-1)
            ratio = _safe_ratio(own, from_zero.sum(-2) - own)
        else:
            own = block.pattern_of(x).diagonal(dim1=-2, dim2=-1)
            ratio = _safe_ratio(own, 1 - own)
        # Filled in with `ratio` times the others' sum, a column sums to 1 + ratio times what it should.
        return (columns + torch.diag_embed(columns.sum(-2) * ratio)) / (1 + ratio)[..., None, :]

    n_pos = x.shape[0]
    if baseline == "itb":
        start = x[:, None].expand(-1, n_pos, -1)
    else:
        shared = torch.zeros_like(x) if baseline == "zero" else given[baseline].to(DOUBLE)
        start = shared.expand(n_pos, -1, -1)
    own_index = torch.arange(n_pos)

    def scalar(difference: Tensor) -> Tensor:
        # Path j is there for destination j alone.
        return _length_or_projection(difference[:, own_index, own_index], direction)

    (parts,), _ = naive_ig(outputs, [start], [x.expand_as(start)], scalar)
    return parts.sum(-1).transpose(-1, -2)


def mlp_map(
    block: Block, x: Tensor, baseline: str, target: Target, x_corrupted: Given = None, tensor: Given = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Contributions of heads [head, dst], skip [dst] and output bias [dst] to the block's output at j.

    Args:
        block: the block.
        x: its resid_pre on the prompt [pos, d_model].
        baseline: 'zero' (heads, skip and bias start at 0), or with the bias kept 'att_itb_a0', 'corrupted',
            'tensor'.
        target: 'l2', or a direction [d_model] or [pos, d_model].
        x_corrupted: resid_pre of the same block on the other prompt.
        tensor: start [pos, head, d_head] of the head outputs for baseline 'tensor', skip kept.
    """
    z, one, own = block.z_of(x), torch.ones_like(x[:, :1]), torch.arange(x.shape[0])
    if baseline == "zero":
        start = [torch.zeros_like(z), torch.zeros_like(x), torch.zeros_like(one)]
    elif baseline == "att_itb_a0":
        everywhere = x[:, None].expand(-1, x.shape[0], -1)
        start = [block.z_of(everywhere)[own, own], x, one]
    elif baseline == "corrupted":
        start = [block.z_of(x_corrupted), x_corrupted, one]
    else:
        start = [tensor.to(DOUBLE), x, one]
    w = _direction(target, x)
    # The tail works token by token: one path serves all destinations, cell j depends on inputs at j alone.
    start, end = ([point[None] for point in points] for points in (start, [z, x, one]))
    parts, _ = naive_ig(block.tail, start, end, lambda d: _length_or_projection(d, w))
    heads, skip, bias = (part.sum(-1)[own, 0, own] for part in parts)
    return heads.T, skip, bias


def _length_or_projection(difference: Tensor, direction: Given) -> Tensor:
    if direction is None:
        return torch.linalg.vector_norm(difference, dim=-1)
    return (difference * direction).sum(-1)


def _direction(target: Target, x: Tensor) -> Given:
    return None if isinstance(target, str) else target.to(DOUBLE).expand_as(x)


def _safe_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    vanishes = denominator.abs() <= 1e-8
    return torch.where(vanishes, 0.0, numerator / torch.where(vanishes, 1.0, denominator))
