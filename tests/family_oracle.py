"""The maps by naive autograd through a plain transformers model: no hook of TransformerLens, none of ours.

The model runs whole, in float64, with the vectors that enter one of its layers, and what the linear map after its heads
puts out, replaced by points of the path.
"""

import itertools
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Maps:
    """[head, src, dst], [head, dst], [dst] and [src, dst]."""

    attn: Tensor
    mlp: Tensor
    skip: Tensor
    block: Tensor


def maps_from_zero(model: nn.Module, layer: nn.Module, out: nn.Linear, n_heads: int, **prompt: Tensor) -> Maps:
    """All maps of one layer, from `zero`.

    Args:
        model: a plain model in float64.
        layer: one of its layers.
        out: the linear map in it that takes head outputs to the attention output.
        n_heads: of the layer.
        prompt: what the model takes, by name, as a batch of one: `input_ids`, say, or `pixel_values`.
    """
    run = _Run(model, layer, out, n_heads, prompt)
    resid, z = run.seen()
    attn_out, n_pos = run.attn_out, len(resid)
    a, weights = _nodes()
    weight = out.weight if isinstance(out, nn.Linear) else out.weight.T
    W_O = weight.detach().T.reshape(n_heads, -1, resid.shape[-1])
    attn = torch.zeros(n_heads, n_pos, n_pos, dtype=torch.float64)
    block = torch.zeros(n_pos, n_pos, dtype=torch.float64)
    mlp, skip = torch.zeros(n_heads, n_pos, dtype=torch.float64), torch.zeros(n_pos, dtype=torch.float64)
    nothing = torch.zeros_like(resid)[None]

    def integrated(scalars: Tensor, *ends: Tensor) -> list[Tensor]:
        """Integrals of the gradients of one scalar at every point of the path."""
        found = torch.autograd.grad(scalars.sum(), ends, retain_graph=True, materialize_grads=True)
        return [torch.einsum("n,npm->pm", weights, one) for one in found]

    x = (a[:, None, None] * resid).requires_grad_()
    (z_0, y_0), (z_a, y_a) = run.at(nothing), run.at(x)
    for j in range(n_pos):
        for h in range(n_heads):
            (by_x,) = integrated((z_a - z_0)[:, j, h].norm(dim=-1), x)
            attn[h, :, j] = (by_x * resid).sum(-1)
        (by_x,) = integrated((y_a - y_0)[:, j].norm(dim=-1), x)
        block[:, j] = (by_x * resid).sum(-1)
    s, o = ((a[:, None, None] * end).requires_grad_() for end in (resid, attn_out))
    moved = run.tail(s, o) - run.tail(nothing, nothing)
    for j in range(n_pos):
        by_s, by_o = integrated(moved[:, j].norm(dim=-1), s, o)
        skip[j] = by_s[j] @ resid[j]
        mlp[:, j] = torch.einsum("m,hem,he->h", by_o[j], W_O, z[j])
    return Maps(attn, mlp, skip, block)


def block_map(model: nn.Module, layer: nn.Module, baseline: str, **prompt: Tensor) -> Tensor:
    """The block map alone, [src, dst], of a layer that need not have heads.

    Args:
        model, layer, prompt: as above.
        baseline: `zero`, or `itb`, which has a path for each destination.
    """
    run = _Run(model, layer, None, 0, prompt)
    resid, _ = run.seen()
    # Besides, what is normed may turn round anywhere on the way (keys of a delta rule).
    a, weights = gauss(np.concatenate([[0.0], np.logspace(-18, -2, 129), np.linspace(0.01, 1, 200)[1:]]), 10)
    result = torch.zeros(len(resid), len(resid), dtype=torch.float64)
    for j in range(len(resid)):
        start = torch.zeros_like(resid) if baseline == "zero" else resid[j].expand_as(resid)
        x = (start + a[:, None, None] * (resid - start)).requires_grad_()
        moved = (run.at(x)[1] - run.at(start[None])[1])[:, j]
        (by_x,) = torch.autograd.grad(moved.norm(dim=-1).sum(), x)
        result[:, j] = torch.einsum("n,npm,pm->p", weights, by_x, resid - start)
        with torch.no_grad():
            total = (run.at(resid[None])[1] - run.at(start[None])[1])[0, j].norm()
        assert float((result[:, j].sum() - total).abs()) <= 2e-5 * float(total), "more nodes"
    return result


def metric_by_source(
    model: nn.Module, layer: nn.Module, metric: Callable[[Tensor], Tensor], clean: Tensor, corrupted: Tensor
) -> tuple[Tensor, float]:
    """What each position's residual vector before a layer contributes to a metric, and what the metric changes by.

    Args:
        model, layer: as above.
        metric: of a batch of logits.
        clean, corrupted: prompts, [1, pos].
    """
    runs = [_Run(model, layer, None, 0, {"input_ids": prompt}) for prompt in (corrupted, clean)]
    start, end = (run.seen()[0] for run in runs)
    a, weights = gauss(np.linspace(0, 1, 41), 10)
    x = (start + a[:, None, None] * (end - start)).requires_grad_()
    with _hooked(layer, None, {}, resid=x):
        values = metric(runs[1].model_output(len(x)).logits)
    (by_x,) = torch.autograd.grad(values.sum(), x)
    with torch.no_grad():
        before, after = (float(metric(model(input_ids=prompt).logits)) for prompt in (corrupted, clean))
    return torch.einsum("n,npm,pm->p", weights, by_x, end - start), after - before


def missed(flow: Any, expected: Maps, allowed: float, row: int = 0) -> float:
    """How far a Flow's maps are from these, relative to the largest of each; the worst, which is `allowed` at most."""
    worst = 0.0
    for name in (*flow.maps, *(("skip",) if "mlp" in flow.maps else ())):
        worst = max(worst, apart(getattr(flow, name)[row], getattr(expected, name), allowed, name))
    return worst


def apart(found: Tensor, wanted: Tensor, allowed: float, name: str) -> float:
    """How far a tensor is from what it should be, relative to the largest number there; `allowed` at most."""
    one = float((found.double() - wanted).abs().max()) / (float(wanted.abs().max()) or 1.0)
    assert one <= allowed, (name, one)
    return one


def _nodes() -> tuple[Tensor, Tensor]:
    """Panels that get smaller towards the start, where norms turn on: several in a row at 1e-12."""
    return gauss(np.concatenate([[0.0], np.logspace(-18, 0, 49)]), 10)


def gauss(edges: np.ndarray, n_nodes: int) -> tuple[Tensor, Tensor]:
    """Gauss nodes on panels between these edges, and their weights."""
    x, w = np.polynomial.legendre.leggauss(n_nodes)
    nodes = np.concatenate([(b - a) / 2 * x + (a + b) / 2 for a, b in itertools.pairwise(edges)])
    weights = np.concatenate([(b - a) / 2 * w for a, b in itertools.pairwise(edges)])
    return torch.tensor(nodes), torch.tensor(weights)


class _Run:
    def __init__(
        self, model: nn.Module, layer: nn.Module, out: nn.Module | None, n_heads: int, prompt: dict[str, Tensor]
    ) -> None:
        self.model, self.layer, self.out, self.n_heads, self.prompt = model, layer, out, n_heads, prompt

    def seen(self) -> tuple[Tensor, Tensor | None]:
        """What enters the layer, and its head outputs, if it has any."""
        kept: dict[str, Tensor] = {}
        with torch.no_grad(), _hooked(self.layer, self.out, kept):
            self.model_output(1)
        self.n_pos = kept["resid"].shape[1]
        if self.out is None:
            return kept["resid"][0].detach(), None
        self.attn_out = kept["attn_out"][0].detach()
        return kept["resid"][0].detach(), self._heads(kept["z"])[0]

    def at(self, resid: Tensor) -> tuple[Tensor | None, Tensor]:
        """Head outputs and the layer's output, when these vectors [point, pos, d_model] enter it."""
        kept: dict[str, Tensor] = {}
        with _hooked(self.layer, self.out, kept, resid=resid):
            self.model_output(len(resid))
        return None if self.out is None else self._heads(kept["z"]), kept["output"]

    def tail(self, skip: Tensor, attn_out: Tensor) -> Tensor:
        """The layer's output, when `skip` enters it and its heads' map puts this out."""
        kept: dict[str, Tensor] = {}
        with _hooked(self.layer, self.out, kept, resid=skip, attn_out=attn_out):
            self.model_output(len(skip))
        return kept["output"]

    def model_output(self, batch: int) -> Any:
        """The model on this many copies of the prompt, under whatever hooks are on it."""
        return self.model(**{name: value.expand(batch, *value.shape[1:]) for name, value in self.prompt.items()})

    def _heads(self, z: Tensor) -> Tensor:
        return z.reshape(-1, self.n_pos, self.n_heads, z.shape[-1] // self.n_heads)


@contextmanager
def _hooked(
    layer: nn.Module,
    out: nn.Module | None,
    kept: dict[str, Tensor],
    resid: Tensor | None = None,
    attn_out: Tensor | None = None,
) -> Any:
    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kept["resid"] = args[0] if args else kwargs["hidden_states"]
        if resid is None:
            return None
        return ((resid, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": resid})

    def through(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        kept["z"], kept["attn_out"] = args[0], output
        return None if attn_out is None else attn_out.reshape(output.shape)

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        kept["output"] = output[0] if isinstance(output, (tuple, list)) else output

    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True), layer.register_forward_hook(leave)]
    if out is not None:
        handles.append(out.register_forward_hook(through))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
