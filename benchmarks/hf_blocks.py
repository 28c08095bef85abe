"""One block of a Hugging Face model as a function of residual vectors, in plain transformers and torch.

It shares no code with lig_lens, and runs with transformers 4 and 5, so that other implementations can be
measured on the same block.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class HfBlock:
    """Block `layer` of a BERT or a Llama, called as the model calls it on `ids`, with other residual vectors.

    `resid_pre` [pos, d_model] is what enters the block when the model runs on `ids`.
    """

    def __init__(self, model: Any, ids: Tensor, layer: int) -> None:
        base = model.base_model
        self._is_bert = hasattr(base, "encoder")
        block = base.encoder.layer[layer] if self._is_bert else base.layers[layer]
        attention = block.attention.self if self._is_bert else block.self_attn
        calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda module, args, kwargs: calls.__setitem__(name, (args, kwargs))

        handles = [
            module.register_forward_pre_hook(keep(name), with_kwargs=True)
            for name, module in (("block", block), ("attention", attention))
        ]
        try:
            with torch.no_grad():
                model(ids[None].to(model.device), **({} if self._is_bert else {"use_cache": False}))
        finally:
            for handle in handles:
                handle.remove()
        self._block, self._calls = block, calls
        self._norm = torch.nn.Identity() if self._is_bert else block.input_layernorm
        self._attention = copy.deepcopy(attention)
        if not self._is_bert:
            self._attention.o_proj = torch.nn.Identity()  # heads before W_O, as BERT's attention.self gives them
        self.n_heads = int(model.config.num_attention_heads)
        args, kwargs = calls["block"]
        self.resid_pre: Tensor = (args[0] if args else kwargs["hidden_states"])[0].detach()

    def resid_post(self, resid: Tensor) -> Tensor:
        """Run the whole block: [batch, pos, d_model] to the same shape."""
        return self._again("block", self._block, resid)

    def heads(self, resid: Tensor) -> Tensor:
        """Run the block's attention: [batch, pos, d_model] to every head's output, [batch, pos, head, d_head]."""
        return self._again("attention", self._attention, self._norm(resid)).unflatten(-1, (self.n_heads, -1))

    def _again(self, name: str, module: Any, values: Tensor) -> Tensor:
        args, kwargs = self._calls[name]
        if args:
            output = module(values, *args[1:], **kwargs)
        else:
            output = module(**{**kwargs, "hidden_states": values})
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result


def start_of_path(baseline: str, resid: Tensor, destination: int) -> Tensor:
    """Where the path of one destination starts, [pos, d_model]: `zero`, or `itb`, its own vector everywhere."""
    return torch.zeros_like(resid) if baseline == "zero" else resid[destination].expand_as(resid).clone()


def moved(run: Callable[[Tensor], Tensor], start: Tensor, destination: int) -> Callable[[Tensor], Tensor]:
    """Give the scalar of one destination: how far its vector is from where it is at `start`.

    Args:
        run: [batch, pos, d_model] to [batch, pos, *].
        start: [pos, d_model].
        destination: a position.

    Returns:
        A function of residual vectors [batch, pos, d_model]; its value is [batch].
    """
    with torch.no_grad():
        origin = run(start[None])[:, destination]

    def scalar(resid: Tensor) -> Tensor:
        return torch.linalg.vector_norm(run(resid)[:, destination] - origin, dim=-1)

    return scalar
