"""What a model on a GPU gives is what it gives on the CPU; skipped where there is none."""

import copy

import pytest
import torch
from tiny_models import KINDS, config_bridge, tiny_bridge
from torch import Tensor
from transformers import LlamaConfig

import lig_lens as ll
from lig_lens import patching

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# The tiny models are float64, but Hugging Face's norms and rotations cast to float32 on the way.
TOL = 1e-4
CLEAN, CORRUPTED = [7, 11, 23, 5, 30, 12, 9], [7, 11, 19, 5, 30, 14, 9]


@pytest.fixture(autouse=True)
def _full_float32():
    """Products of TF32, which some set for speed, round to 1e-3."""
    kept = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = kept


def on_gpu(model: object) -> object:
    moved = copy.deepcopy(model).to("cuda")
    moved.cfg.device = "cuda"
    return moved


def assert_same(gpu: Tensor, cpu: Tensor, tol: float) -> None:
    assert gpu.device == cpu.device, "numbers come back to the CPU"
    assert float((gpu - cpu).abs().max()) <= tol * max(float(cpu.abs().max()), 1e-30)


@pytest.mark.parametrize("engine", ["auto", "hooks"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_maps(kind: str, engine: str) -> None:
    model = tiny_bridge(kind, torch.float64)
    for baselines in ({}, {"attn_baseline": "zero", "mlp_baseline": "att_itb_a0", "block_baseline": "itb"}):
        asked = {"tol": TOL, "engine": engine, "progress": False, **baselines}
        cpu, gpu = ll.attribute(model, CLEAN, **asked), ll.attribute(on_gpu(model), CLEAN, **asked)
        for name in cpu.maps:
            assert_same(getattr(gpu, name), getattr(cpu, name), 2 * TOL)
            assert float(gpu.converged[name].float().mean()) > 0.97


@pytest.mark.parametrize("split", ["source", "message"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox", "gemma2"])
def test_metric(kind: str, split: str) -> None:
    model = tiny_bridge(kind, torch.float64)
    asked = {
        "target": ll.logit_difference(3, 8),
        "corrupted": CORRUPTED,
        "split": split,
        "progress": False,
        "tol": TOL,
    }
    cpu, gpu = ll.attribute(model, CLEAN, **asked), ll.attribute(on_gpu(model), CLEAN, **asked)
    for name in ("attn", "skip"):
        assert_same(getattr(gpu, name), getattr(cpu, name), 2 * TOL)
    assert gpu.settings["metric"] == pytest.approx(cpu.settings["metric"], rel=1e-6)


@pytest.mark.parametrize("at", ["hook_z", "resid_pre"])
def test_patching(at: str) -> None:
    model, metric = tiny_bridge("llama", torch.float64), ll.logit_difference(3, 8)
    found = [patching.patch(one, CLEAN, CORRUPTED, metric, at=at, progress=False) for one in (model, on_gpu(model))]
    assert_same(found[1].values, found[0].values, 1e-5)
    cut = [patching.knock_out(one, CLEAN, metric, layers=[1], progress=False) for one in (model, on_gpu(model))]
    assert_same(cut[1].values.nan_to_num(), cut[0].values.nan_to_num(), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = config_bridge(config, dtype)
    cpu, gpu = (ll.attribute(one, CLEAN, progress=False, tol=1e-3) for one in (model, on_gpu(model)))
    for name in cpu.maps:
        assert bool(gpu.converged[name].all())
        # The block's own residual vectors are rounded to the model's precision, on either device in its own way.
        assert_same(getattr(gpu, name), getattr(cpu, name), 2e-3 if dtype == torch.float32 else 5e-2)


def test_packaged_and_file(tmp_path) -> None:
    """A packaged model, loaded onto the GPU: a pair of texts, and a file that grows."""
    gpu, cpu = ll.load_model("induction", device="cuda"), ll.load_model("induction")
    pair = ll.induction_pairs(1)[0]
    asked = {"target": ll.logit_difference(pair.answer, pair.wrong), "corrupted": pair.corrupted, "progress": False}
    a, b = ll.attribute(gpu, pair.clean, **asked), ll.attribute(cpu, pair.clean, **asked)
    assert_same(a.attn, b.attn, 1e-3)
    grown = ll.attribute(gpu, pair.clean, out=tmp_path / "flow.safetensors", progress=False)
    assert_same(grown.attn, ll.attribute(cpu, pair.clean, progress=False).attn, 1e-3)
