"""Quantised weights: explained where their products are those of numbers, refused where they are codes.

What torchao's int8 weights are to torch is made here by hand, so that nothing has to be installed: a tensor that wraps
codes and scales, and knows one function.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import GQA, IDS, OTHER, saved
from family_oracle import maps_from_zero, missed
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

import lig_lens as ll
from lig_lens.errors import InputError


class Int8Weight(Tensor):
    """Codes times scales, by row."""

    codes: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scales.dtype)  # type: ignore[attr-defined]

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.codes, self.scales = codes, scales

    def numbers(self) -> Tensor:
        return self.codes.to(self.scales) * self.scales

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scales"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> "Int8Weight":
        return Int8Weight(inner["codes"], inner["scales"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            given, weight, *bias = args
            return func(given, weight.numbers(), *bias, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Int8Weight(args[0].codes, args[0].scales)
        raise NotImplementedError(f"{func} of Int8Weight")


def _quantise(plain: nn.Module, wrapped: bool) -> None:
    """Round the weights of all layers' linear maps, and keep them as wrapped codes or as numbers."""
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear) and "layers" in name:
            weight = module.weight.detach()
            scales = weight.abs().amax(1, keepdim=True) / 127
            held = Int8Weight((weight / scales).round().to(torch.int8), scales)
            module.weight = nn.Parameter(held if wrapped else held.numbers(), requires_grad=False)


def _bridge(folder: Path, plain: Any) -> Any:
    bridge = TransformerBridge.boot_transformers(str(folder), hf_model=plain, device="cpu")
    bridge.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    return bridge


@pytest.fixture
def plain(tmp_path: Path) -> Any:
    saved("LlamaForCausalLM", tmp_path, **GQA)
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()


@pytest.mark.parametrize("engine", ["auto", "hooks"])
def test_wrapped_weights_are_explained(engine: str, plain: Any, tmp_path: Path) -> None:
    """Against float64 autograd through the same model, whose weights are the rounded numbers."""
    numbers = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    _quantise(plain, wrapped=True)
    _quantise(numbers, wrapped=False)
    model = _bridge(tmp_path, plain)
    assert isinstance(model.blocks[1].attn.o.original_component.weight, Int8Weight)
    zero = {"attn_baseline": "zero", "mlp_baseline": "zero", "block_baseline": "zero"}
    flow = ll.attribute(model, IDS, layers=[1], engine=engine, tol=1e-4, progress=False, **zero)
    block = numbers.double().model.layers[1]
    expected = maps_from_zero(numbers, block, block.self_attn.o_proj, 4, input_ids=torch.tensor([IDS]))
    assert missed(flow, expected, 1e-4) < 1e-4
    assert flow.engines["attn"] == ("closed_form" if engine == "auto" else "hooks",)
    metric = ll.attribute(model, IDS, corrupted=OTHER, target=ll.logit_difference(3, 4), progress=False)
    with torch.no_grad():
        ends = [numbers(torch.tensor([ids])).logits[0, -1, 3:5] for ids in (IDS, OTHER)]
    change = ends[0][0] - ends[0][1] - (ends[1][0] - ends[1][1])
    totals = (metric.attn.sum((1, 2, 3)) + metric.skip.sum(1)).double()
    torch.testing.assert_close(totals, change.expand(2), rtol=2e-3, atol=1e-5)
    effects = ll.patching.knock_out(model, IDS, ll.logit_difference(3, 4), layers=[1], progress=False)
    same = ll.patching.knock_out(
        _bridge(tmp_path, numbers.float()), IDS, ll.logit_difference(3, 4), layers=[1], progress=False
    )
    torch.testing.assert_close(effects.values, same.values, rtol=1e-3, atol=1e-5, equal_nan=True)


def test_a_quantised_block_that_changes_is_found_anew(plain: Any, tmp_path: Path) -> None:
    """Codes are part of what a block is known by."""
    _quantise(plain, wrapped=True)
    model = _bridge(tmp_path, plain)
    asked: dict[str, Any] = {"maps": "attn", "layers": [1], "progress": False}
    before = ll.attribute(model, IDS, **asked)
    model.blocks[1].attn.v.original_component.weight.codes[::2].zero_()
    after = ll.attribute(model, IDS, **asked)
    assert not torch.allclose(before.attn, after.attn, rtol=1e-3)


def test_codes_are_refused_before_work_starts(plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _bridge(tmp_path, plain)
    packed = nn.Parameter(torch.zeros(128, 1, dtype=torch.uint8), requires_grad=False)  # as bitsandbytes has them
    model.blocks[1].attn.v.original_component.weight = packed

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("work had started")

    monkeypatch.setattr("lig_lens.blocks.known.record_calls", never)
    for call in (
        lambda: ll.attribute(model, IDS, progress=False),
        lambda: ll.describe_boundaries(model),
        lambda: ll.patching.patch(model, IDS, OTHER, ll.logit_difference(3, 4), progress=False),
    ):
        with pytest.raises(
            InputError, match=r"v_proj.* of block 1 is quantised \(Parameter, torch\.uint8\).*dequantize"
        ):
            call()


def test_wrapped_weights_in_half_precision_are_refused(plain: Any, tmp_path: Path) -> None:
    _quantise(plain.to(torch.bfloat16), wrapped=True)
    model = _bridge(tmp_path, plain)
    for more in ({}, {"corrupted": OTHER, "target": ll.logit_difference(3, 4)}):
        with pytest.raises(InputError, match=r"_proj.* of block 0 is quantised .* computes in bfloat16.* in float32"):
            ll.attribute(model, IDS, progress=False, **more)
