"""Models of images: their logits and maps against the plain model, and what is read, kept and refused of images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from family_oracle import maps_from_zero, missed
from image_models import CLASSIFIERS, KINDS, PATCHES, SMALL, image, in_order, load, saved
from recorded import held

import lig_lens as ll
from lig_lens.cli.main import run
from lig_lens.errors import InputError
from lig_lens.models.adapters import IMAGES
from lig_lens.models.plain import _run

ORACLE: dict[str, tuple[str, dict[str, Any]]] = {
    "ViTForImageClassification": ("vit.layers", {}),
    "DeiTForImageClassification": ("deit.layers", {}),
    "Dinov2Model": ("encoder.layer", {}),
    "Dinov2ForImageClassification": ("dinov2.encoder.layer", {"use_swiglu_ffn": True}),
    "Dinov2WithRegistersModel": ("encoder.layer", {"layerscale_value": 1e-3}),
    "ViTMAEModel": ("layers", {}),
    "ViTMAEForPreTraining": ("vit.layers", {"qkv_bias": False}),
}


@pytest.mark.parametrize("kind", ORACLE)
def test_maps_are_those_of_the_plain_model(kind: str, tmp_path: Path) -> None:
    """Against autograd through the plain transformers model, in float64."""
    layers, more = ORACLE[kind]
    plain = saved(kind, tmp_path, **more).double()
    model = load(tmp_path, dtype="float64")
    layer, pixels = plain.get_submodule(layers)[1], image().double()
    expected = maps_from_zero(plain, layer, layer.attention.o_proj, 4, pixel_values=pixels[None], **in_order(plain))
    asked = {"attn_baseline": "zero", "mlp_baseline": "zero", "block_baseline": "zero"}
    flow = ll.attribute(model, pixels, layers=[1], tol=1e-5, max_nodes=8192, progress=False, **asked)
    assert flow.layouts == ("scaled_pre_ln" if "Dino" in kind else "pre_ln",)
    assert set(flow.engines["attn"]) == {"closed_form"}
    held(kind, "images", flow, missed(flow, expected, 1e-4))


@pytest.mark.parametrize("kind", IMAGES)
def test_logits_are_those_of_the_plain_model(kind: str, tmp_path: Path) -> None:
    plain = saved(kind, tmp_path)
    model = load(tmp_path)
    with torch.no_grad():
        output, found = plain(image()[None], **in_order(plain)), model(image()[None])
    expected = output.logits if hasattr(output, "logits") else output.last_hidden_state
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    again = _run(plain, lambda: plain)  # loading could see whether the bridge differs
    assert again is not None and again.has_head == hasattr(output, "logits")


@pytest.mark.parametrize("kind", ["ViTModel", "Dinov2Model", "ViTMAEModel"])
def test_engines_agree_on_every_map(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path)
    model = load(tmp_path, dtype="float64")
    assert all(one.engine == "closed_form" for one in ll.describe_boundaries(model))
    closed, hooks = (
        ll.attribute(model, image(), engine=engine, tol=1e-5, progress=False) for engine in ("closed_form", "hooks")
    )
    for name in ("attn", "mlp", "skip", "block"):
        one, other = getattr(closed, name), getattr(hooks, name)
        assert float((one - other).abs().max()) <= 1e-4 * float(one.abs().max()), name


def test_a_masked_autoencoder_sees_every_patchin_order(tmp_path: Path) -> None:
    plain = saved("ViTMAEModel", tmp_path)
    assert plain.config.mask_ratio == 0.75  # as it is saved
    model = load(tmp_path)
    with torch.no_grad():
        once, again = model(image()[None]), model(image()[None])
        some = plain(image()[None]).last_hidden_state
    assert some.shape[1] < once.shape[1] == 10
    torch.testing.assert_close(once, again, rtol=0, atol=0)
    flows = [ll.attribute(model, image(), maps="attn", progress=False) for _ in range(2)]
    torch.testing.assert_close(flows[0].attn, flows[1].attn, rtol=0, atol=0)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_classes_are_explained(kind: str, tmp_path: Path) -> None:
    """The contributions of every layer add up to the change of the classifier's own logit."""
    plain = saved(kind, tmp_path)
    model = load(tmp_path)
    with torch.no_grad():
        change = float((plain(image(0)[None]).logits - plain(image(1)[None]).logits)[0, 2])
    flow = ll.attribute(model, image(0), corrupted=image(1), target=ll.class_logit(2), progress=False)
    torch.testing.assert_close(
        (flow.attn.sum((1, 2, 3)) + flow.skip.sum(1)).double(), torch.full((2,), change).double(), rtol=2e-3, atol=1e-4
    )
    assert flow.settings["corrupted_pixels"]["sha256"] != flow.settings["pixels"]["sha256"]


@pytest.mark.parametrize("kind, layers", [("ViTForImageClassification", "vit"), ("ViTMAEForPreTraining", "vit")])
def test_patches_contribute_what_the_plain_model_says(kind: str, layers: str, tmp_path: Path) -> None:
    """Over heads and what bypasses them: Integrated Gradients of the output by what enters a layer, patch by patch."""
    plain = saved(kind, tmp_path).double()
    model, options = load(tmp_path, dtype="float64"), in_order(plain)
    layer = plain.get_submodule(layers).layers[0]

    def logits(resid: torch.Tensor | None, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        entered = []

        def enter(_module: Any, args: tuple[Any, ...]) -> Any:
            entered.append(args[0] if resid is None else resid)
            return (entered[-1], *args[1:])

        handle = layer.register_forward_pre_hook(enter)
        try:
            batch = pixels.expand(1 if resid is None else len(resid), -1, -1, -1)
            noise = {name: value.expand(len(batch), -1) for name, value in options.items()}
            return plain(batch, **noise).logits.flatten(1), entered[0]
        finally:
            handle.remove()

    clean, start = (logits(None, image(seed).double()[None])[1].detach()[0] for seed in (0, 1))
    a, weights = (torch.tensor(array) for array in np.polynomial.legendre.leggauss(200))
    path = (start + (a[:, None, None] + 1) / 2 * (clean - start)).requires_grad_()
    (gradients,) = torch.autograd.grad(logits(path, image().double()[None])[0][:, 3].sum(), path)
    expected = ((clean - start) * torch.einsum("n,npm->pm", weights / 2, gradients)).sum(-1)
    target = ll.metric(lambda output: output.flatten(1)[0, 3], "the fourth logit")
    flow = ll.attribute(model, image(0), corrupted=image(1), target=target, layers=[0], tol=1e-6, progress=False)
    found = flow.attn[0].sum((0, 2)).double() + flow.skip[0].double()
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_a_reconstruction_is_a_metric(tmp_path: Path) -> None:
    plain = saved("ViTMAEForPreTraining", tmp_path)
    model = load(tmp_path)
    with torch.no_grad():
        ends = [float(plain(image(n)[None], **in_order(plain)).logits[0, 4].mean()) for n in (0, 1)]
    middle = ll.metric(lambda logits: logits[0, 4].mean(), "mean of the middle patch")
    flow = ll.attribute(model, image(0), corrupted=image(1), target=middle, progress=False)
    torch.testing.assert_close(
        flow.total["attn"].double(), torch.full((2,), ends[0] - ends[1]).double(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.endswith("Model")])
def test_a_model_without_a_head_takes_no_metric_of_logits(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path)
    model = load(tmp_path)
    asked = {"corrupted": image(1), "progress": False}
    with pytest.raises(InputError, match=f"saved as {kind}, which has no head: it gives vectors"):
        ll.attribute(model, image(0), target=ll.class_logit(1), **asked)
    own = ll.attribute(model, image(0), target=ll.metric(lambda output: output[0, 0, 0]), **asked)
    torch.testing.assert_close(own.attn.sum((1, 2, 3)) + own.skip.sum(1), own.total["attn"], rtol=1e-3, atol=1e-5)


def _without(folder: Path, start: str) -> None:
    """Take weights out of a saved model."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith(start)}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_head_that_was_never_loaded_is_named(tmp_path: Path) -> None:
    saved("ViTForImageClassification", tmp_path)
    _without(tmp_path, "classifier")
    model = load(tmp_path)
    with pytest.raises(InputError, match="random weights: classifier"):
        ll.attribute(model, image(0), corrupted=image(1), target=ll.class_logit(1), progress=False)


def test_a_pooler_need_not_be_there(tmp_path: Path) -> None:
    """DINO's checkpoints have none, and nothing that is explained passes it."""
    saved("ViTModel", tmp_path)
    _without(tmp_path, "pooler.")
    flow = ll.attribute(load(tmp_path), image(), maps="attn", progress=False)
    assert flow.attn.shape == (2, 4, 10, 10)


def test_blocks_that_were_never_loaded_are_named(tmp_path: Path) -> None:
    saved("Dinov2Model", tmp_path)
    _without(tmp_path, "encoder.layer.1.layer_scale1")
    with pytest.raises(InputError, match=r"lacks weights of its blocks: encoder\.layer\.1\.layer_scale1"):
        load(tmp_path)


def test_a_family_of_images_that_is_not_served_is_named(tmp_path: Path) -> None:
    config = transformers.BeitConfig(**SMALL)
    transformers.BeitModel(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"BeitModel \(model_type 'beit'\) is served neither by"):
        load(tmp_path)


def test_several_images_at_once(classifier: Any) -> None:
    flows = ll.attribute(classifier, [image(0), image(1)[None]], maps="attn", progress=False)
    alone = ll.attribute(classifier, image(1), maps="attn", progress=False)
    torch.testing.assert_close(flows[1].attn, alone.attn, rtol=1e-4, atol=1e-6)
    mean = ll.average(flows).mean
    assert mean.tokens == flows[0].tokens and "pixels" not in mean.settings
    with pytest.raises(InputError, match="Prompt 1 of 2: The prompt is the text"):
        ll.attribute(classifier, [image(0), "a cat"], progress=False)


def test_a_tensor_is_a_baseline(classifier: Any) -> None:
    start = torch.zeros(10, 32)
    options: dict[str, Any] = {"maps": "attn", "progress": False}
    flow = ll.attribute(classifier, image(), attn_baseline=start, **options)
    zero = ll.attribute(classifier, image(), attn_baseline="zero", **options)
    torch.testing.assert_close(flow.attn, zero.attn, rtol=1e-3, atol=1e-5)
    for name in ("itb_zero_ratio", "itb_map_ratio"):
        assert ll.attribute(classifier, image(), attn_baseline=name, **options).attn.isfinite().all()


def test_half_precision(tmp_path: Path) -> None:
    for kind in ("ViTForImageClassification", "ViTMAEModel", "Dinov2Model"):
        saved(kind, tmp_path / kind)
        single, half = (load(tmp_path / kind, dtype=dtype) for dtype in ("float32", "bfloat16"))
        flows = [
            ll.attribute(model, image(), attn_baseline="zero", maps="attn", progress=False) for model in (single, half)
        ]
        apart = (flows[0].attn - flows[1].attn).abs().max() / flows[0].attn.abs().max()
        assert float(apart) < 0.1


def test_boundaries_need_no_image(classifier: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, given = ll.describe_boundaries(classifier), ll.describe_boundaries(classifier, image(3))
    assert found == given and [one.layout for one in found] == ["pre_ln", "pre_ln"]
    saved("Dinov2Model", tmp_path)
    assert run(["boundaries", str(tmp_path)]) == 0
    assert "scaled_pre_ln" in capsys.readouterr().out
    assert ll.describe_boundaries(tmp_path, config_only=True)[0].n_heads == 4


def test_patches_are_patched(classifier: Any) -> None:
    """Interventions see positions, whatever they hold."""
    effects = ll.patching.patch(classifier, image(0), image(1), ll.class_logit(1), progress=False)
    assert effects.tokens == ("[CLS]", *PATCHES) and effects.values.isfinite().all()


def test_tables_and_pages_take_patches(classifier: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flow = ll.attribute(classifier, image(), progress=False)
    path = flow.save(tmp_path / "flow.safetensors")
    assert run(["view", str(path), "--html", str(tmp_path / "view.html")]) == 0
    assert set(flow.to_dataframe().src_token) == {"[CLS]", *PATCHES}
    assert '"pixels"' in flow.to_json()
    flow.explore().save(tmp_path / "page.html")
    for figure in (ll.plots.head_grid(flow), ll.plots.head_map(flow, 0, 1), ll.plots.importance(flow)):
        assert figure.data


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "Classification" in kind])
def test_half_precision_computes_in_single(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path)
    model = load(tmp_path, dtype="bfloat16")
    asked = {"corrupted": image(1), "target": ll.class_logit(1), "layers": [1], "progress": False}
    half = ll.attribute(model, image(0), **asked)
    single = ll.attribute(model.to(torch.float32), image(0), **asked)
    assert float((half.attn - single.attn).abs().max()) <= 0.02 * float(single.attn.abs().max())
