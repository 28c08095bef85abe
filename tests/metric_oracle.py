"""Naive oracle of contributions to a metric: forward-mode derivatives of attention, float64, no code of the package.

What the package gets from one gradient at the heads' outputs, this gets source by source: the derivative of every head
output along that source's own step, or of every message along the steps of all.
"""

from collections.abc import Callable

import oracle
import torch
from tiny_models import N_LAYERS, _Float64Everywhere, exact_hf
from torch import Tensor


def unembed(kind: str) -> Callable[[Tensor], Tensor]:
    """What the exact model makes of the residual stream that leaves its last block: logits [batch, pos, d_vocab]."""
    model = exact_hf(kind)

    def logits(resid: Tensor) -> Tensor:
        with _Float64Everywhere():
            if kind == "bert":
                return model.cls(resid)
            base = model.base_model
            names = [name for name in ("ln_f", "final_layer_norm", "norm") if hasattr(base, name)]
            found = model.get_output_embeddings()(getattr(base, names[0])(resid))
            cap = getattr(model.config, "final_logit_softcapping", None)
            return found if cap is None else cap * torch.tanh(found / cap)

    return logits


def contributions(
    kind: str, layer: int, x: Tensor, x0: Tensor, function: Callable[[Tensor], Tensor], split: str = "source"
) -> tuple[Tensor, Tensor, float]:
    """Contributions along the straight path of resid_pre from x0 to x.

    Args:
        kind: of tiny model.
        layer: which block the path enters.
        x: resid_pre [pos, d_model] at its end.
        x0: the same at its start.
        function: of logits [1, pos, d_vocab].
        split: what heads' outputs are split by, `source` or `message`.

    Returns:
        heads [head, src, dst], skip [src], and the change of the metric.
    """
    blocks = [oracle.block_of(exact_hf(kind), later) for later in range(layer, N_LAYERS)]
    head = unembed(kind)

    def downstream(z: Tensor, skip: Tensor) -> Tensor:
        resid = blocks[0].tail(z, skip)
        for block in blocks[1:]:
            resid = block.run(resid)
        return torch.stack([function(one[None]) for one in head(resid)])

    def messages(resid: Tensor) -> Tensor:
        return torch.einsum("...hjs,...she->...hjse", blocks[0].pattern_of(resid), blocks[0].values_of(resid))

    step = x - x0
    with torch.no_grad():
        ends = torch.stack([x, x0])
        values = downstream(blocks[0].z_of(ends), ends)
    total, gap = float(values[0] - values[1]), 0.0
    own = torch.eye(len(x), dtype=x.dtype)[:, :, None] * step  # source by source, its own step
    for n_per_panel in (8, 16, 32):
        nodes, weights = oracle.graded_rule(n_per_panel)
        points = x0 + nodes[:, None, None] * step
        leaves = blocks[0].z_of(points).requires_grad_(), points.clone().requires_grad_()
        by_z, by_skip = torch.autograd.grad(downstream(*leaves).sum(), leaves)
        skip = torch.einsum("n,npd,pd->p", weights, by_skip, step)
        heads = torch.zeros(by_z.shape[2], len(x), len(x), dtype=x.dtype)
        if split == "message":
            moved = torch.func.jvp(messages, (points,), (step.expand_as(points),))[1]
            heads = torch.einsum("n,nhjse,njhe->hsj", weights, moved, by_z)
        for src in range(len(x)) if split == "source" else ():
            tangent = torch.func.jvp(blocks[0].z_of, (points,), (own[src].expand_as(points),))[1]
            heads[:, src] = torch.einsum("n,njhe,njhe->hj", weights, tangent, by_z)
        gap = abs(float(heads.sum() + skip.sum()) - total)
        if gap <= 1e-6 * max(abs(total), 1e-2):
            return heads, skip, total
    raise AssertionError(f"The oracle's own gap is {gap} of {total}.")


def held_contributions(
    kind: str, layer: int, x: Tensor, x0: Tensor, function: Callable[[Tensor], Tensor], others: bool, noising: bool
) -> tuple[Tensor, Tensor]:
    """Contributions where only what attention reads moves, the skip connection being held as in one of the runs.

    Args:
        kind: of tiny model.
        layer: which block the path enters.
        x: resid_pre [pos, d_model] at its end.
        x0: the same at its start.
        function: of logits [1, pos, d_vocab].
        others: the outputs of other heads are held too.
        noising: as in the run of x; else as in that of x0.

    Returns:
        heads [head, src, dst], and the change of the metric as each head moves, or [1] as all do.
    """
    blocks = [oracle.block_of(exact_hf(kind), later) for later in range(layer, N_LAYERS)]
    head, step, held = unembed(kind), x - x0, x if noising else x0

    def downstream(z: Tensor) -> Tensor:
        resid = blocks[0].tail(z, held.expand(len(z), -1, -1))
        for block in blocks[1:]:
            resid = block.run(resid)
        return torch.stack([function(one[None]) for one in head(resid)])

    with torch.no_grad():
        z_start, z_end, z_held = blocks[0].z_of(torch.stack([x0, x, held]))
    n_heads, n_pos = z_end.shape[1], len(x)
    moving = [[one] for one in range(n_heads)] if others else [list(range(n_heads))]
    own = torch.eye(n_pos, dtype=x.dtype)[:, :, None] * step
    heads, totals = torch.zeros(n_heads, n_pos, n_pos, dtype=x.dtype), []
    nodes, weights = oracle.graded_rule(24)
    points = x0 + nodes[:, None, None] * step
    tangents = [torch.func.jvp(blocks[0].z_of, (points,), (one.expand_as(points),))[1] for one in own]
    for chosen in moving:

        def with_moved(z: Tensor, chosen: list[int] = chosen) -> Tensor:
            mask = torch.zeros(n_heads, 1, dtype=torch.bool)
            mask[chosen] = True
            return torch.where(mask, z, z_held)

        leaf = blocks[0].z_of(points).detach().requires_grad_()
        (by_z,) = torch.autograd.grad(downstream(with_moved(leaf)).sum(), leaf)
        for src, tangent in enumerate(tangents):
            heads[:, src] += torch.einsum("n,njhe,njhe->hj", weights, tangent, by_z)
        with torch.no_grad():
            end, start = downstream(with_moved(torch.stack([z_end, z_start])))
        totals.append(end - start)
    return heads, torch.stack(totals)
