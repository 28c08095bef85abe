"""Models of images: their logits and maps against the plain model, and what is read, kept and refused of images."""

import base64
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from at_blocks import read_prompt
from family_oracle import maps_from_zero, missed
from PIL import Image
from recorded import held

import lig_lens as ll
from lig_lens.cli.main import run
from lig_lens.errors import InputError
from lig_lens.models.adapters import IMAGES
from lig_lens.models.plain import _run

SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 12,
    "patch_size": 4,
}  # fmt: skip
CLASSES = {**SMALL, "num_labels": 5}
DINO = {**{key: value for key, value in CLASSES.items() if key != "intermediate_size"}, "mlp_ratio": 2}
REGISTERS = {**DINO, "num_register_tokens": 2}
MASKED = {
    **SMALL, "decoder_num_attention_heads": 4, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1,
    "decoder_intermediate_size": 24,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "ViTModel": SMALL,
    "ViTForImageClassification": CLASSES,
    "DeiTModel": SMALL,
    "DeiTForImageClassification": CLASSES,
    "DeiTForImageClassificationWithTeacher": CLASSES,
    "Dinov2Model": DINO,
    "Dinov2ForImageClassification": DINO,
    "Dinov2WithRegistersModel": REGISTERS,
    "Dinov2WithRegistersForImageClassification": REGISTERS,
    "ViTMAEModel": MASKED,
    "ViTMAEForPreTraining": MASKED,
}
CLASSIFIERS = [kind for kind in KINDS if "ForImageClassification" in kind]
PATCHES = tuple(f"r{row}c{column}" for row in range(3) for column in range(3))


def image(seed: int = 0, *size: int) -> torch.Tensor:
    return torch.randn(3, *(size or (12, 12)), generator=torch.Generator().manual_seed(seed))


def saved(kind: str, folder: Path, **more: Any) -> Any:
    """Save a random model of a class of transformers, with weights large enough to matter; gives the plain model."""
    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**KINDS[kind], **more})).eval()
    for weight in model.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return model


def load(folder: Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ll.BridgeWarning)
        return ll.load_model(str(folder), device="cpu", **options)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A ViT with a head and an image processor."""
    folder = tmp_path_factory.mktemp("vit")
    saved("ViTForImageClassification", folder)
    processor = transformers.ViTImageProcessorPil(size={"height": 12, "width": 12})
    processor.save_pretrained(folder)
    return load(folder)


def _in_order(plain: Any) -> dict[str, torch.Tensor]:
    """Arguments by which a plain masked autoencoder sees all patches in order; none for other models."""
    if not hasattr(plain.config, "mask_ratio"):
        return {}
    plain.config.mask_ratio = 0.0
    return {"noise": torch.arange(9.0)[None]}


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
    expected = maps_from_zero(plain, layer, layer.attention.o_proj, 4, pixel_values=pixels[None], **_in_order(plain))
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
        output, found = plain(image()[None], **_in_order(plain)), model(image()[None])
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


def test_a_masked_autoencoder_sees_every_patch_in_order(tmp_path: Path) -> None:
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
    model, options = load(tmp_path, dtype="float64"), _in_order(plain)
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
        ends = [float(plain(image(n)[None], **_in_order(plain)).logits[0, 4].mean()) for n in (0, 1)]
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


@pytest.mark.parametrize(
    "kind, special", [("ViTModel", 1), ("DeiTModel", 2), ("Dinov2WithRegistersModel", 3), ("ViTMAEForPreTraining", 1)]
)
def test_positions_are_patches_by_row_and_column(kind: str, special: int, tmp_path: Path) -> None:
    saved(kind, tmp_path)
    model = load(tmp_path)
    read = read_prompt(model, image())
    assert read.tokens == (("[CLS]", "[DIST]") if "DeiT" in kind else ("[CLS]", "[REG1]", "[REG2]"))[:special] + PATCHES
    assert read.special == (True,) * special + (False,) * 9
    # A patch's pixels enter at its own position: r1c2.
    changed = image().clone()
    changed[:, 4:8, 8:12] += 1
    entered = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _module, args: entered.append(args[0][0]))
    with torch.no_grad():
        model(image()[None]), model(changed[None])
    hook.remove()
    moved = (entered[0] - entered[1]).abs().amax(-1) > 1e-6
    assert moved.nonzero().flatten().tolist() == [read.tokens.index("r1c2")]


def test_images_of_any_size_where_the_model_takes_them(tmp_path: Path) -> None:
    plain = saved("Dinov2ForImageClassification", tmp_path)
    model = load(tmp_path)
    wide = image(0, 9, 16)  # the last row of pixels is in no patch
    flow = ll.attribute(model, wide, corrupted=image(1, 9, 16), target=ll.class_logit(0), progress=False)
    assert flow.tokens[1:] == tuple(f"r{row}c{column}" for row in range(2) for column in range(4))
    assert flow.settings["pixels"]["grid"] == [2, 4]
    with torch.no_grad():
        change = plain(wide[None]).logits[0, 0] - plain(image(1, 9, 16)[None]).logits[0, 0]
    torch.testing.assert_close(flow.total["attn"], change.expand(2), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"corrupted is an image \[3, 12, 12\], the prompt an image \[3, 9, 16\]"):
        ll.attribute(model, wide, corrupted=image(), maps="attn", attn_baseline="corrupted", progress=False)
    with pytest.raises(InputError, match=r"\[3, 3, 16\].* of at least a patch, 4 by 4: resize"):
        ll.attribute(model, image(0, 3, 16), progress=False)


def _spoilt(value: float) -> torch.Tensor:
    pixels = image()
    pixels[1, 3, 3] = value
    return pixels


BAD: dict[str, tuple[Any, str]] = {
    "a text": ("a cat", r"is the text 'a cat', and this model takes images: give an image of Pillow, or pixel values"),
    "channels": (image()[:1], r"has shape \[1, 12, 12\], and the model takes \[3, 12, 12\]"),
    "no channels": (image()[0], r"has shape \[12, 12\], and the model takes \[3, 12, 12\]"),
    "channels last": (image().permute(1, 2, 0), r"channels are last: put them first, permute\(2, 0, 1\)"),
    "size": (image(0, 16, 12), r"has shape \[3, 16, 12\], and the model takes \[3, 12, 12\]: resize"),
    "a batch": (image()[None].repeat(2, 1, 1, 1), r"a batch of 2: pass a list of images"),
    "integers": (torch.arange(432).reshape(3, 12, 12) % 256, r"whole numbers from 0 to 255 .*divide by 255"),
    "bytes as floats": (torch.arange(432.0).reshape(3, 12, 12) % 256, r"whole numbers from 0 to 255"),
    "NaN": (_spoilt(float("nan")), "holds NaN or infinite pixel values"),
    "infinite": (_spoilt(float("inf")), "holds NaN or infinite pixel values"),
    "booleans": (image() > 0, "whole numbers from 0 to 1 .*bool"),
    "words": (np.array([["a"]]), "holds no numbers"),
    "nothing": (None, "is of type NoneType: give an image of Pillow"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_image_for_the_model_is_refused(case: str, classifier: Any) -> None:
    prompt, message = BAD[case]
    with pytest.raises(InputError, match=f"^The prompt .*{message}"):
        ll.attribute(classifier, prompt, progress=False)
    with pytest.raises(InputError):
        ll.describe_boundaries(classifier, prompt if prompt is not None else "text")


def test_bytes_without_a_processor_are_refused(tmp_path: Path) -> None:
    saved("ViTModel", tmp_path)
    model = load(tmp_path)
    picture = Image.fromarray(np.zeros((12, 12, 3), dtype=np.uint8))
    with pytest.raises(InputError, match="is an image, and no image processor was saved with the model"):
        ll.attribute(model, picture, progress=False)
    with pytest.raises(InputError, match=r"whole numbers from 0 to 9 \(torch.uint8\)"):
        ll.attribute(model, np.full((3, 12, 12), 9, dtype=np.uint8) * (np.arange(12) > 3), progress=False)


@pytest.mark.parametrize("name, value", [("attention_mask", torch.ones(10)), ("prepend_bos", True)])
def test_options_of_texts_are_refused(name: str, value: Any, classifier: Any) -> None:
    with pytest.raises(InputError, match=f"{name} goes with text"):
        ll.attribute(classifier, image(), progress=False, **{name: value})


@pytest.mark.parametrize("prompt", [image(), image()[None], Image.new("RGB", (12, 12)), image().numpy()])
def test_images_are_refused_by_a_model_of_text(prompt: Any) -> None:
    induction = ll.load_model("induction", device="cpu")
    with pytest.raises(InputError, match="is an image, and this model takes text"):
        ll.attribute(induction, prompt, progress=False)


def test_the_command_line_names_what_it_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved("ViTForImageClassification", tmp_path)
    assert run(["explain", "a cat", "--model", str(tmp_path), "--no-progress"]) == 2
    assert "this model takes images" in capsys.readouterr().err


def test_images_and_patches_that_are_not_square(tmp_path: Path) -> None:
    saved("ViTForImageClassification", tmp_path, image_size=[8, 18], patch_size=[4, 6])
    model = load(tmp_path)
    flow = ll.attribute(model, image(0, 8, 18), progress=False)
    assert flow.tokens[1:] == tuple(f"r{row}c{column}" for row in range(2) for column in range(3))
    assert len(ll.plots.image_map(flow).layout.images) == 3
    with pytest.raises(InputError, match=r"\[3, 18, 8\], and the model takes \[3, 8, 18\]: resize"):
        ll.attribute(model, image(0, 18, 8), progress=False)


def test_a_bridge_as_transformer_lens_makes_it(tmp_path: Path) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    saved("ViTForImageClassification", tmp_path)
    flows = [
        ll.attribute(model, image(), progress=False)
        for model in (TransformerBridge.boot_transformers(str(tmp_path), device="cpu"), load(tmp_path))
    ]
    for name in flows[0].maps:
        torch.testing.assert_close(getattr(flows[0], name), getattr(flows[1], name), rtol=1e-4, atol=1e-6)


def test_equal_images_are_refused(classifier: Any) -> None:
    with pytest.raises(InputError, match=r"corrupted equals the prompt, an image \[3, 12, 12\]"):
        ll.attribute(classifier, image(), corrupted=image(), target=ll.class_logit(0), progress=False)


def _photo(mode: str = "RGB", size: tuple[int, int] = (30, 20)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_an_image_is_processed_as_the_model_wants_it(mode: str, classifier: Any) -> None:
    expected = classifier.processor(images=_photo(mode).convert("RGB"), return_tensors="pt")["pixel_values"]
    read = read_prompt(classifier, _photo(mode))
    torch.testing.assert_close(read.arguments()[0], expected, rtol=0, atol=0)


def test_bytes_are_processed(classifier: Any) -> None:
    pixels = np.asarray(_photo()).transpose(2, 0, 1)
    read, same = read_prompt(classifier, pixels), read_prompt(classifier, _photo())
    torch.testing.assert_close(read.arguments()[0], same.arguments()[0], rtol=0, atol=0)
    assert read.record() == same.record()


def _picture(flow: Any) -> np.ndarray[Any, Any]:
    kept = flow.settings["pixels"]["image"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(kept.removeprefix("data:image/png;base64,")))))


def test_a_flow_keeps_the_image_that_it_is_of(classifier: Any, tmp_path: Path) -> None:
    photo = _photo(size=(12, 12))
    flow = ll.attribute(classifier, photo, maps="attn", layers=[0], progress=False, out=tmp_path / "a.safetensors")
    flow.save(tmp_path / "b.safetensors")
    for name in "ab":
        again = ll.Flow.load(tmp_path / f"{name}.safetensors")
        assert again.tokens == ("[CLS]", *PATCHES) and again.settings == flow.settings
        torch.testing.assert_close(again.attn, flow.attn, rtol=0, atol=0)
        np.testing.assert_array_equal(_picture(again), np.asarray(photo))
    assert flow.settings["pixels"]["shape"] == [3, 12, 12]
    # Of pixel values alone the darkest is black, the brightest white; grey images stay grey.
    read = read_prompt(classifier, image())
    assert read.record()["sha256"] == read_prompt(classifier, image().double()).record()["sha256"]


def test_a_large_image_is_kept_small() -> None:
    from lig_lens.inputs.pictures import picture_of

    grey = torch.linspace(-1, 1, 450)[None, None, :].expand(1, 300, 450)
    kept = picture_of(grey)
    assert kept is not None
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(kept.partition(",")[2]))))
    assert shown.shape == (100, 150) and shown[0, 0] <= 2 and shown[-1, -1] >= 253
    assert (np.diff(shown[0].astype(int)) >= 0).all()
    assert picture_of(torch.zeros(4, 8, 8)) is None
    flat = picture_of(torch.ones(3, 8, 8))
    assert flat is not None and len(flat) < 200


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


def test_complex_pixels_are_named(classifier: Any) -> None:
    with pytest.raises(InputError, match="holds complex numbers: check how they were made"):
        ll.attribute(classifier, image(0) * 1j, progress=False)
