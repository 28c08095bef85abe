"""Images as prompts: what is read of them, what is refused, and what a Flow keeps."""

import base64
import copy
import io
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from at_blocks import read_prompt
from image_models import (
    PATCHES,
    image,
    load,
    saved,
)
from PIL import Image
from transformers import ViTImageProcessor

import lig_lens as ll
from lig_lens.cli.main import run
from lig_lens.errors import InputError


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
    "no pixels": (torch.empty(3, 0, 0, dtype=torch.uint8), r"has no pixels \(\[3, 0, 0\]\): give an image of Pillow"),
    "no rows": (Image.new("RGB", (5, 0)), r"has no pixels \(5 by 0\)"),
    "more levels": (Image.new("I;16", (12, 12)), "pixels of mode 'I;16', not of 256 levels"),
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


def test_a_processor_for_another_size_is_named(tmp_path: Path) -> None:
    """The remedy is taken from the message."""
    saved("ViTForImageClassification", tmp_path)
    ViTImageProcessor(size={"height": 24, "width": 24}).save_pretrained(tmp_path)
    model, picture = load(tmp_path), _photo()
    with pytest.raises(InputError, match="makes images of 24 by 24, and the model takes 12 by 12") as caught:
        ll.attribute(model, picture, progress=False)
    remedy = re.search(r"set (model\.processor\.size = \{.*?\})", str(caught.value))
    assert remedy is not None
    exec(remedy[1])
    assert read_prompt(model, picture).values.shape == (1, 3, 12, 12)


def test_a_broken_processor_is_named(tmp_path: Path) -> None:
    saved("ViTForImageClassification", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": ')
    model = load(tmp_path)
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(
            InputError, match=r"could be loaded with the model: its preprocessor_config\.json is broken"
        ):
            ll.attribute(one, _photo(), progress=False)
    ll.attribute(model, image(), maps="attn", layers=[0], progress=False)  # pixel values need none
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchProcessor"}')
    with pytest.raises(InputError, match=r"no image processor could be loaded with the model: .+"):
        ll.attribute(load(tmp_path), _photo(), progress=False)


def test_pixels_with_a_gradient_are_taken_without_it(classifier: Any) -> None:
    asked = {"maps": "attn", "layers": [0], "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow = ll.attribute(classifier, image().requires_grad_(), **asked)
    assert torch.equal(flow.attn, ll.attribute(classifier, image(), **asked).attn)


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


def test_complex_pixels_are_named(classifier: Any) -> None:
    with pytest.raises(InputError, match="holds complex numbers: check how they were made"):
        ll.attribute(classifier, image(0) * 1j, progress=False)
