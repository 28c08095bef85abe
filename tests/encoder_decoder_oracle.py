"""Maps of models with an encoder and a decoder by naive autograd through the plain transformers model.

No hook of TransformerLens, none of ours: the model runs whole, in float64, with the vectors that enter one of its
layers (or the encoder's output) replaced by points of a path.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from family_oracle import Maps, gauss, maps_from_zero
from torch import Tensor, nn
from transformers.modeling_outputs import MoEModelOutput


@dataclass
class Held:
    """What is put into a run: at the layer's entry, and in place of what the linear map after its heads puts out."""

    resid: Tensor | None = None
    attn_out: Tensor | None = None
    cut: bool = False


@dataclass
class Seen:
    """What a run shows; `z_after` is what the rest got where the run was cut behind the heads."""

    resid: Tensor = field(init=False)
    z: Tensor = field(init=False)
    z_after: Tensor = field(init=False)
    attn_out: Tensor = field(init=False)
    output: Tensor = field(init=False)
    logits: Tensor = field(init=False)


class Plain:
    """A plain model in float64, one of its layers, and the linear map in it that is behind the heads asked about."""

    def __init__(
        self, model: nn.Module, layer: nn.Module, out: nn.Linear, n_heads: int, source: list[int], target: list[int]
    ) -> None:
        self.model, self.layer, self.out, self.n_heads = model, layer, out, n_heads
        self.source, self.target = torch.tensor([source]), torch.tensor([target])

    def run(self, held: Held | None = None, encoded: Tensor | None = None, grad: bool = True) -> Seen:
        """Run the model, with as many copies of the prompt as `held` or the encoder's output has items."""
        held, seen = held or Held(), Seen()
        given = next((one for one in (encoded, held.resid) if one is not None), None)
        count = 1 if given is None else len(given)
        inputs: dict[str, Any] = {"decoder_input_ids": self.target.expand(count, -1), "use_cache": False}
        if encoded is None:
            inputs["input_ids"] = self.source.expand(count, -1)
        else:
            inputs["encoder_outputs"] = MoEModelOutput(last_hidden_state=encoded)
        with _hooked(self.layer, self.out, held, seen), torch.set_grad_enabled(grad):
            seen.logits = self.model(**inputs).logits
        seen.z = self.heads(seen.z)
        return seen

    def heads(self, z: Tensor) -> Tensor:
        """Head outputs one by one: [item, pos, head, d_head]."""
        return z.reshape(*z.shape[:-1], self.n_heads, z.shape[-1] // self.n_heads)

    def maps_from_zero(self) -> Maps:
        """Self-attention's maps."""
        prompt = {"input_ids": self.source, "decoder_input_ids": self.target}
        return maps_from_zero(self.model, self.layer, self.out, self.n_heads, **prompt)

    def across(self, start: Tensor | None = None) -> Tensor:
        """What the encoder's output contributes to the heads that `out` is behind, [head, src, dst].

        Args:
            start: of the path, [src, d_model]; 0 by default.
        """
        clean, encoded = self.run(grad=False), self.encoded()
        start = torch.zeros_like(encoded) if start is None else start
        step, held = encoded - start, clean.resid.expand(len(NODES), -1, -1)
        x = (start + NODES[:, None, None] * step).requires_grad_()
        first, moved = self.run(Held(clean.resid), start[None], grad=False), self.run(Held(held), x)
        result = torch.zeros(self.n_heads, len(encoded), clean.z.shape[1], dtype=torch.float64)
        for j, h in itertools.product(range(result.shape[2]), range(self.n_heads)):
            (by_x,) = integrated((moved.z - first.z)[:, j, h].norm(dim=-1), x)
            result[h, :, j] = (by_x * step).sum(-1)
        return result

    def encoded(self) -> Tensor:
        """The encoder's output."""
        with torch.no_grad():
            return self.model.get_encoder()(input_ids=self.source).last_hidden_state[0]

    def to_metric(self, start: Tensor, metric: Any) -> tuple[Tensor, Tensor]:
        """Contributions to a metric of the logits [1, pos, d_vocab], through heads [head, src, dst] and past them.

        Args:
            start: of the path of what enters the layer.
            metric: the function.
        """
        resid = self.run(grad=False).resid[0]
        step, n_pos = resid - start, len(resid)
        x = (start + EVEN_NODES[:, None, None] * step).requires_grad_()
        seen = self.run(Held(x, cut=True))
        values = torch.stack([metric(one[None]) for one in seen.logits])
        by_z, by_x = torch.autograd.grad(values.sum(), (seen.z_after, x), materialize_grads=True, retain_graph=True)
        by_z = self.heads(by_z)
        heads = torch.zeros(self.n_heads, n_pos, n_pos, dtype=torch.float64)
        for j, h in itertools.product(range(n_pos), range(self.n_heads)):
            (found,) = torch.autograd.grad(seen.z[:, j, h], x, by_z[:, j, h], retain_graph=True)
            heads[h, :, j] = torch.einsum("n,npm,pm->p", EVEN_WEIGHTS, found, step)
        return heads, torch.einsum("n,npm,pm->p", EVEN_WEIGHTS, by_x, step)


def integrated(scalars: Tensor, *ends: Tensor) -> list[Tensor]:
    """Integrals of the gradients of one scalar at every point of the path."""
    found = torch.autograd.grad(scalars.sum(), ends, retain_graph=True, materialize_grads=True)
    return [torch.einsum("n,npm->pm", WEIGHTS, one) for one in found]


# Panels that get smaller towards the start, where one norm after the other turns on; and such as are all alike.
NODES, WEIGHTS = gauss(np.concatenate([[0.0], np.logspace(-8, 0, 33)]), 8)
EVEN_NODES, EVEN_WEIGHTS = gauss(np.linspace(0.0, 1.0, 65), 8)


@contextmanager
def _hooked(layer: nn.Module, out: nn.Module, held: Held, seen: Seen) -> Iterator[None]:
    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen.resid = args[0] if args else kwargs["hidden_states"]
        if held.resid is None:
            return None
        return ((held.resid, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": held.resid})

    def before(_module: nn.Module, args: tuple[Any, ...]) -> Any:
        seen.z = args[0]
        if held.cut:
            seen.z_after = args[0].detach().requires_grad_()
            return (seen.z_after,)
        return None

    def through(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        seen.attn_out = output
        return None if held.attn_out is None else held.attn_out

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.output = output[0] if isinstance(output, tuple) else output

    handles = [
        layer.register_forward_pre_hook(enter, with_kwargs=True),
        out.register_forward_pre_hook(before),
        out.register_forward_hook(through),
        layer.register_forward_hook(leave),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
