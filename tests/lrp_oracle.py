"""Naive oracles of methods that propagate or decompose: float64 weights of plain transformers, no code of the package.

Relevance is handed back by hand, number by number as LRP's rules say, `R_x = x * (W^T (R_y / y))`, not as a gradient.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from class_oracle import ClassOracle
from torch import Tensor

Back = Callable[[Tensor], Tensor]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Back]:
    """Epsilon rule with an epsilon of 0; the bias keeps its part."""
    y = x @ weight.T + (0 if bias is None else bias)
    return y, lambda relevance: x * ((relevance / y) @ weight)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Back]:
    """A linear map, x less its mean, times what is held."""
    n = x.shape[-1]
    sigma = (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    y = (x - x.mean(-1, keepdim=True)) / sigma * weight + bias
    centre = torch.eye(n, dtype=x.dtype) - 1 / n
    return y, lambda relevance: x * ((relevance / y * weight / sigma) @ centre)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Back]:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight, lambda relevance: relevance


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, held: bool, turn: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """Queries, keys and values [head, pos, d_head]; gives output, pattern, and relevance of q, k, v and pattern.

    `turn` is rotary: linear, so that relevance of what enters it is found column by column.
    """
    tq, tk = turn(q), turn(k)
    scores = tq @ tk.mT * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
    pattern = scores.softmax(-1)
    out = pattern @ v

    def back(relevance: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        share = relevance / out
        on_v = v * (pattern.mT @ share)
        if held:
            return torch.zeros_like(q), torch.zeros_like(k), on_v, torch.zeros_like(pattern)
        on_pattern = pattern * (share @ v.mT) / 2
        # Relevance of a score by its size; what is masked has no pattern, and gets 0.
        unit = on_pattern - pattern * on_pattern.sum(-1, keepdim=True)
        on_tq, on_tk = unit @ tk * scale / 2, unit.mT @ tq * scale / 2
        return q * _turned_back(turn, q, on_tq), k * _turned_back(turn, k, on_tk), on_v / 2, on_pattern

    return out, pattern, back


def _turned_back(turn: Callable[[Tensor], Tensor], like: Tensor, unit: Tensor) -> Tensor:
    found = torch.zeros_like(like)
    for e in range(like.shape[-1]):
        one = torch.zeros_like(like)
        one[..., e] = 1
        found[..., e] = (turn(one) * unit).sum(-1)
    return found


@dataclass
class Found:
    """Relevance [pos] at every boundary, and of every block's pattern [head, dst, src]."""

    token: list[Tensor]
    pattern: list[Tensor]


def explicit(oracle: ClassOracle, prompt: Tensor, target: int, held: bool = False) -> Found:
    """LRP of a class's logit by hand."""
    return {"Bert": _bert, "ViT": _vit, "GPT2": _gpt2, "Llama": _llama}[
        next(name for name in ("Bert", "ViT", "GPT2", "Llama") if oracle.kind.startswith(name))
    ](oracle, oracle.resid(prompt)[0], target, held)


def _weights(module: Any) -> tuple[Tensor, Tensor]:
    return module.weight.detach(), module.bias.detach()


def _heads(x: Tensor, n: int) -> Tensor:
    return x.unflatten(-1, (n, -1)).movedim(-2, 0)


def _flat(x: Tensor) -> Tensor:
    return x.movedim(0, -2).flatten(-2)


def _act(function: Any, x: Tensor) -> tuple[Tensor, Back]:
    return function(x).detach(), lambda relevance: relevance


def _split(parts: list[Tensor], relevance: Tensor) -> list[Tensor]:
    """A sum shares by size."""
    whole = sum(parts)
    return [part * relevance / whole for part in parts]


def _same(x: Tensor) -> Tensor:
    return x


def _attend(
    x: Tensor, maps: list[tuple[Tensor, Any]], out: tuple[Tensor, Any], n_heads: int, causal: bool, held: bool,
    turn: Callable[[Tensor], Tensor] = _same, groups: int = 1,
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:  # fmt: skip
    """Attention from vectors to its output; gives relevance of the vectors and of the pattern."""
    (q, back_q), (k, back_k), (v, back_v) = [linear(x, *one) for one in maps]
    d_head = q.shape[-1] // n_heads
    many = [_heads(one, one.shape[-1] // d_head) for one in (q, k, v)]
    z, _, back_z = attention(
        many[0], *[one.repeat_interleave(groups, 0) for one in many[1:]], d_head**-0.5, causal, held, turn
    )
    y, back_y = linear(_flat(z), *out)

    def back(relevance: Tensor) -> tuple[Tensor, Tensor]:
        on_q, on_k, on_v, on_pattern = back_z(_heads(back_y(relevance), n_heads))
        on_k, on_v = (one.unflatten(0, (-1, groups)).sum(1) for one in (on_k, on_v))
        return back_q(_flat(on_q)) + back_k(_flat(on_k)) + back_v(_flat(on_v)), on_pattern

    return y, back


def _bert(oracle: ClassOracle, x: Tensor, target: int, held: bool) -> Found:
    config, backs = oracle.model.config, []
    for block in oracle.blocks:
        own, out = block.attention.self, block.attention.output
        maps = [_weights(own.query), _weights(own.key), _weights(own.value)]
        a, back_a = _attend(x, maps, _weights(out.dense), config.num_attention_heads, False, held)
        h, back_h = layer_norm(a + x, *_weights(out.LayerNorm), config.layer_norm_eps)
        up, down, act = block.intermediate.dense, block.output.dense, block.intermediate.intermediate_act_fn
        m, back_m = _two_maps(h, _weights(up), act, _weights(down))
        y, back_y = layer_norm(m + h, *_weights(block.output.LayerNorm), config.layer_norm_eps)
        backs.append(functools.partial(_post_ln_back, (x, a, h, m), (back_a, back_h, back_m, back_y)))
        x = y
    pooled, back_p = linear(x[:1], *_weights(oracle.model.bert.pooler.dense))
    return _from_head(x, 0, pooled.tanh(), back_p, _weights(oracle.model.classifier), target, backs)


def _post_ln_back(values: tuple[Tensor, ...], backs: tuple[Any, ...], r: Tensor) -> tuple[Tensor, Tensor]:
    (x, a, h, m), (back_a, back_h, back_m, back_y) = values, backs
    on_m, on_h = _split([m, h], back_y(r))
    on_a, on_x = _split([a, x], back_h(on_h + back_m(on_m)))
    through, pattern = back_a(on_a)
    return on_x + through, pattern


def _from_head(
    x: Tensor, read: int, last: Tensor, back_last: Back, head: tuple[Tensor, Any], target: int, backs: list[Any]
) -> Found:
    """Start with one class's logit, at the position that the head reads."""
    logits, back_head = linear(last, *head)
    relevance = torch.zeros_like(logits)
    relevance[0, target] = logits[0, target]
    on_x = torch.zeros_like(x)
    on_x[read] = back_last(back_head(relevance))[0]
    token, patterns = [on_x.sum(-1)], []
    for back in reversed(backs):
        on_x, pattern = back(on_x)
        token.insert(0, on_x.sum(-1))
        patterns.insert(0, pattern)
    return Found(token, patterns)


def _pre_ln(norm: Any, attend: Any, mlp: Any, x: Tensor) -> tuple[Tensor, Any]:
    """A block with norms before its parts; `norm`, `attend` and `mlp` give a value and the way back."""
    n1, back_1 = norm(0, x)
    a, back_a = attend(n1)
    mid = x + a
    n2, back_2 = norm(1, mid)
    m, back_m = mlp(n2)

    def back(r: Tensor) -> tuple[Tensor, Tensor]:
        on_mid, on_m = _split([mid, m], r)
        on_x, on_a = _split([x, a], on_mid + back_2(back_m(on_m)))
        through, pattern = back_a(on_a)
        return on_x + back_1(through), pattern

    return mid + m, back


def _two_maps(x: Tensor, first: Any, act: Any, second: Any) -> tuple[Tensor, Back]:
    f, back_f = linear(x, *first)
    g, _ = _act(act, f)
    y, back_y = linear(g, *second)
    return y, lambda r: back_f(back_y(r))


def _vit(oracle: ClassOracle, x: Tensor, target: int, held: bool) -> Found:
    config, backs = oracle.model.config, []
    for block in oracle.blocks:
        own = block.attention
        maps = [_weights(one) for one in (own.q_proj, own.k_proj, own.v_proj)]
        norms = [_weights(block.layernorm_before), _weights(block.layernorm_after)]
        x, back = _pre_ln(
            lambda i, x, norms=norms: layer_norm(x, *norms[i], config.layer_norm_eps),
            lambda x, maps=maps, own=own: _attend(
                x, maps, _weights(own.o_proj), config.num_attention_heads, False, held
            ),
            lambda x, mlp=block.mlp: _two_maps(x, _weights(mlp.fc1), mlp.activation_fn, _weights(mlp.fc2)),
            x,
        )
        backs.append(back)
    last, back_n = layer_norm(x[:1], *_weights(oracle.model.vit.layernorm), config.layer_norm_eps)
    return _from_head(x, 0, last, back_n, _weights(oracle.model.classifier), target, backs)


def _gpt2(oracle: ClassOracle, x: Tensor, target: int, held: bool) -> Found:
    config, backs = oracle.model.config, []

    def turned(module: Any) -> tuple[Tensor, Tensor]:
        return module.weight.detach().T, module.bias.detach()

    for block in oracle.blocks:
        weight, bias = turned(block.attn.c_attn)
        maps = list(zip(weight.chunk(3), bias.chunk(3), strict=True))
        norms = [_weights(block.ln_1), _weights(block.ln_2)]
        x, back = _pre_ln(
            lambda i, x, norms=norms: layer_norm(x, *norms[i], config.layer_norm_epsilon),
            lambda x, maps=maps, own=block.attn: _attend(x, maps, turned(own.c_proj), config.n_head, True, held),
            lambda x, mlp=block.mlp: _two_maps(x, turned(mlp.c_fc), mlp.act, turned(mlp.c_proj)),
            x,
        )
        backs.append(back)
    last, back_n = layer_norm(x[-1:], *_weights(oracle.model.transformer.ln_f), config.layer_norm_epsilon)
    return _from_head(x, -1, last, back_n, (oracle.model.score.weight.detach(), None), target, backs)


def _llama(oracle: ClassOracle, x: Tensor, target: int, held: bool) -> Found:
    config, backs = oracle.model.config, []
    d_head = config.hidden_size // config.num_attention_heads
    angle = torch.arange(len(x))[:, None] * config.rope_parameters["rope_theta"] ** (
        -torch.arange(0, d_head, 2, dtype=torch.float64) / d_head
    )
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def gated(x: Tensor, mlp: Any) -> tuple[Tensor, Back]:
        gate, back_gate = linear(x, mlp.gate_proj.weight.detach())
        up, back_up = linear(x, mlp.up_proj.weight.detach())
        y, back_y = linear(gate * gate.sigmoid() * up, mlp.down_proj.weight.detach())

        def back(r: Tensor) -> Tensor:
            half = back_y(r) / 2
            return back_gate(half) + back_up(half)

        return y, back

    for block in oracle.blocks:
        own = block.self_attn
        maps = [(one.weight.detach(), None) for one in (own.q_proj, own.k_proj, own.v_proj)]
        norms = [block.input_layernorm.weight.detach(), block.post_attention_layernorm.weight.detach()]
        x, back = _pre_ln(
            lambda i, x, norms=norms: rms_norm(x, norms[i], config.rms_norm_eps),
            lambda x, maps=maps, own=own: _attend(
                x,
                maps,
                (own.o_proj.weight.detach(), None),
                config.num_attention_heads,
                True,
                held,
                turn,
                config.num_attention_heads // config.num_key_value_heads,
            ),
            lambda x, mlp=block.mlp: gated(x, mlp),
            x,
        )
        backs.append(back)
    last, back_n = rms_norm(x[-1:], oracle.model.model.norm.weight.detach(), config.rms_norm_eps)
    return _from_head(x, -1, last, back_n, (oracle.model.score.weight.detach(), None), target, backs)


def decomposed(oracle: ClassOracle, prompt: Tensor, target: int) -> Tensor:
    """DecompX with biases shared by absdot, on BERT, as equations and released code have it: [pos]."""
    model, config = oracle.model, oracle.model.config
    x = oracle.resid(prompt)[0]
    n, n_heads = len(x), config.num_attention_heads
    parts = torch.zeros(n, n, x.shape[-1], dtype=torch.float64)  # [pos, source, d]
    for i in range(n):
        parts[i, i] = x[i]

    def share(parts: Tensor, bias: Tensor) -> Tensor:
        weight = torch.einsum("...kd,d->...k", parts, bias).abs()
        return parts + (weight / weight.sum(-1, keepdim=True))[..., None] * bias

    def norm(parts: Tensor, module: Any) -> Tensor:
        whole = parts.sum(1)
        sigma = (whole.var(-1, unbiased=False) + config.layer_norm_eps).sqrt()
        centred = (parts - parts.mean(-1, keepdim=True)) / sigma[:, None, None] * module.weight.detach()
        return share(centred, module.bias.detach())

    for block, pattern in zip(oracle.blocks, oracle(prompt)[1], strict=True):
        own, out = block.attention.self, block.attention.output
        v = (parts @ own.value.weight.detach().T).unflatten(-1, (n_heads, -1))
        mixed = torch.einsum("hji,ikhe->jkhe", pattern[0].detach(), v).flatten(-2) @ out.dense.weight.detach().T
        bias = out.dense.weight.detach() @ own.value.bias.detach() + out.dense.bias.detach()
        h = norm(share(mixed + parts, bias), out.LayerNorm)
        f = share(h @ block.intermediate.dense.weight.detach().T, block.intermediate.dense.bias.detach())
        whole = f.sum(1)
        g = f * (block.intermediate.intermediate_act_fn(whole).detach() / whole)[:, None]
        m = share(g @ block.output.dense.weight.detach().T, block.output.dense.bias.detach())
        parts = norm(m + h, block.output.LayerNorm)
    pooler = model.bert.pooler.dense
    p = share(parts[0] @ pooler.weight.detach().T, pooler.bias.detach())
    p = p * (p.sum(0).tanh() / p.sum(0))
    return share(p @ model.classifier.weight.detach().T, model.classifier.bias.detach())[:, target]
