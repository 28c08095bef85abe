"""XGLM in float64: transformers 5.23 makes the smallest score that it allows a number of PyTorch's default dtype."""

import contextlib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _FullInDouble(TorchFunctionMode):
    """Numbers that are made in float64, which one without axes does not force upon what it is compared with."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wanted = {"dtype": torch.float64} if func is torch.full else {}
        return func(*args, **{**wanted, **(kwargs or {})})


def xglm_adapter(of_transformer_lens: type) -> type:
    """TransformerLens' adapter of XGLM, whose attention runs in any dtype."""
    from transformers.models.xglm.modeling_xglm import XGLMAttention

    class AnyPrecisionAttention(XGLMAttention):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            given = [*args, *kwargs.values()]
            double = any(isinstance(one, torch.Tensor) and one.dtype == torch.float64 for one in given)
            with _FullInDouble() if double else contextlib.nullcontext():
                return super().forward(*args, **kwargs)

    class XGLMAdapter(of_transformer_lens):  # type: ignore[misc]
        def prepare_model(self, hf_model: Any) -> None:
            super().prepare_model(hf_model)
            for layer in hf_model.model.layers:
                layer.self_attn.__class__ = AnyPrecisionAttention

    return XGLMAdapter
