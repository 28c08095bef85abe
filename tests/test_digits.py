"""The packaged model of digits: the plain model's logits, what its README claims, and the images that it goes with."""

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

import lig_lens as ll
from lig_lens.errors import InputError, MissingPackageError
from lig_lens.inputs.digit_images import MEAN, STD
from lig_lens.inputs.image_references import image_reference
from lig_lens.inputs.pixels import read_image
from lig_lens.models.packaged import PACKAGED

FOLDER = PACKAGED["digits"]()


@pytest.fixture(scope="module")
def model() -> Any:
    return ll.load_model("digits", device="cpu")


@pytest.fixture(scope="module")
def held_out() -> Any:
    pytest.importorskip("sklearn", reason="needs scikit-learn: pip install scikit-learn")
    return ll.digit_images()


def ink(seed: int) -> torch.Tensor:
    """Some image, bright and dark as digits are."""
    brightness = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (brightness - MEAN) / STD


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logits_are_those_of_the_plain_model(dtype: str) -> None:
    plain = transformers.ViTForImageClassification.from_pretrained(FOLDER, dtype=getattr(torch, dtype)).eval()
    model = ll.load_model("digits", device="cpu", dtype=dtype)
    pixels = torch.cat([ink(seed) for seed in range(4)]).to(plain.dtype)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), plain(pixels).logits, rtol=1e-5, atol=1e-5)


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 1e6


def test_what_the_readme_claims_is_so(model: Any, held_out: Any) -> None:
    text = (FOLDER / "README.md").read_text()
    ((right, n, low, high),) = re.findall(
        r"(\d+) of the (\d+) .*?\(95 % interval ([\d.]+) % to ([\d.]+) %;", text, re.S
    )
    assert int(n) == len(held_out)
    pixels, labels = torch.stack([one.pixels for one in held_out]), torch.tensor([one.label for one in held_out])
    with torch.no_grad():
        hits = model(pixels).argmax(-1) == labels
    assert abs(int(hits.sum()) - int(right)) <= 1  # a tie of logits may fall otherwise on another machine
    # Wilson's interval is where the claimed share lies within 1.96 of its own standard errors of what was found.
    share = int(right) / int(n)
    for end in (float(low) / 100, float(high) / 100):
        assert abs(share - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / int(n)), abs=1e-3)
    # And a hundred of them are right as often, within three standard errors.
    some = float(hits[:100].double().mean())
    assert abs(some - share) <= 3 * math.sqrt(share * (1 - share) / 100)


def test_images_are_held_out_and_always_the_same(held_out: Any) -> None:
    train = ll.digit_images("train")
    assert (len(train), len(held_out)) == (1400, 397)
    seen = {one.pixels.numpy().tobytes() for one in train}
    assert not any(one.pixels.numpy().tobytes() in seen for one in held_out)
    assert [one.label for one in held_out[:10]] == [2, 8, 2, 2, 5, 7, 9, 5, 4, 8]
    assert {one.label for one in held_out} == set(range(10))
    pixels = torch.stack([one.pixels for one in held_out])
    assert (pixels.shape, pixels.dtype) == ((397, 1, 8, 8), torch.float32)
    ends = torch.tensor([(0 - MEAN) / STD, (1 - MEAN) / STD])
    torch.testing.assert_close(torch.stack([pixels.min(), pixels.max()]), ends)


def test_pictures_are_read_as_the_images_are(model: Any, held_out: Any) -> None:
    pixels = held_out[0].pixels
    levels = (((pixels[0] * STD + MEAN) * 255).round()).to(torch.uint8)
    read = read_image(model, Image.fromarray(levels.numpy()))
    half_a_level = 0.5 / 255 / STD
    torch.testing.assert_close(read.values[0], pixels, rtol=0, atol=half_a_level + 1e-6)
    black = read_image(model, Image.new("L", (8, 8)))
    torch.testing.assert_close(image_reference(read, "black").values, black.values)
    assert read.tokens[:3] == ("[CLS]", "r0c0", "r0c1") and len(read.tokens) == 17


def test_a_class_is_explained_in_closed_form(model: Any) -> None:
    """Contributions to a digit's logit add up, in every layer, to what the model says of two images."""
    one, other = ink(0), ink(1)
    with torch.no_grad():
        change = (model(one) - model(other))[0, 3]
    flow = ll.attribute(model, one, corrupted=other, target=ll.class_logit(3), progress=False)
    assert set(flow.engines["attn"]) == {"closed_form"}
    totals = flow.attn.sum((1, 2, 3)) + flow.skip.sum(1)
    torch.testing.assert_close(totals, change.expand(len(totals)), rtol=2e-3, atol=1e-4)


def test_what_cannot_be_had_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="Unknown split 'test': use one of 'train', 'held_out'"):
        ll.digit_images("test")
    for name in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingPackageError, match=r"needs the package 'scikit-learn'.*pip install scikit-learn"):
        ll.digit_images()


@pytest.mark.program
def test_it_can_be_trained_again(held_out: Any, tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "training" / "digits.py"
    few = ["--filling", "1", "--naming", "1", "--layers", "1", "--width", "16", "--patch", "4", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, script, *few], check=True, timeout=300, capture_output=True, text=True)
    assert re.search(r"held out: \d+ of 397 right, [\d.]+% \(95 % interval", done.stdout)
    trained = ll.load_model(tmp_path)
    read = read_image(trained, Image.new("L", (8, 8)))
    assert trained(read.values).shape == (1, 10) and len(read.tokens) == 5 and read.look is not None
