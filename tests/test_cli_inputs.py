"""`lig-lens explain` on images and on models with an encoder and a decoder: the program, on tiny models."""

import json
import sys
from pathlib import Path
from typing import Any

import image_models
import numpy as np
import pytest
import torch
from checkpoints import GQA, saved
from PIL import Image
from test_encoder_decoder import BART
from transformers import ViTImageProcessor

import lig_lens as ll
from lig_lens.cli.main import run


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bart")
    saved("BartForConditionalGeneration", folder, **BART)
    return str(folder)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("vit")
    image_models.saved("ViTForImageClassification", folder)
    ViTImageProcessor(size={"height": 12, "width": 12}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    draw = np.random.default_rng(0)
    paths = [tmp_path / "one.png", tmp_path / "two.jpg"]
    for path in paths:
        Image.fromarray(draw.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
    return [str(path) for path in paths]


def _explained(tmp_path: Path, *arguments: str) -> ll.Flow:
    """What the program writes, the same in all its files."""
    names = {"--out": "f.safetensors", "--json": "f.json", "--html": "f.html"}
    files = [part for flag, name in names.items() for part in (flag, str(tmp_path / name))]
    assert run(["explain", *arguments, *files, "--no-progress"]) == 0
    flow = ll.Flow.load(tmp_path / "f.safetensors")
    assert json.loads((tmp_path / "f.json").read_text())["tokens"] == list(flow.tokens)
    page = (tmp_path / "f.html").read_text()
    assert "<title>lig_lens: " in page and "http://" not in page.partition("<body")[0]
    return flow


def _same(flow: ll.Flow, expected: Any) -> None:
    assert flow.maps == expected.maps and flow.tokens == expected.tokens and flow.dst_tokens == expected.dst_tokens
    for name in flow.maps:
        torch.testing.assert_close(getattr(flow, name), getattr(expected, name), rtol=0, atol=0)


@pytest.mark.parametrize("stream", ["decoder", "encoder", "cross"])
def test_streams(stream: str, bart: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["w1 w2 w3", "--target-text", "w5 w6", "--stream", stream, "--model", bart, "--device", "cpu"]
    flow = _explained(tmp_path, *arguments)
    model = ll.load_model(bart, device="cpu")
    _same(flow, ll.attribute(model, ("w1 w2 w3", "w5 w6"), stream=stream, progress=False))
    assert ("w1 w2 w3 → [SEP] w5 w6" in capsys.readouterr().out) == (stream == "cross")
    assert "<title>lig_lens: w1 w2 w3 → w5 w6</title>" in (tmp_path / "f.html").read_text()


@pytest.mark.parametrize(
    "stream, other", [("decoder", ("w1 w2 w3", "w7 w6")), ("encoder", "w1 w9 w3"), ("cross", "w1 w9 w3")]
)
def test_a_second_prompt_is_of_the_side_that_a_path_passes(stream: str, other: Any, bart: str, tmp_path: Path) -> None:
    text = other if isinstance(other, str) else other[1]
    asked = ["--maps", "attn", "--attn-baseline", "corrupted", "--corrupted", text, "--stream", stream]
    flow = _explained(tmp_path, "w1 w2 w3", "--target-text", "w5 w6", "--model", bart, "--device", "cpu", *asked)
    options = {"maps": "attn", "attn_baseline": "corrupted", "corrupted": other, "stream": stream, "progress": False}
    _same(flow, ll.attribute(ll.load_model(bart, device="cpu"), ("w1 w2 w3", "w5 w6"), **options))


def test_a_config_file_holds_the_prompt(bart: str, vit: str, photos: list[str], tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(f"model: {bart}\ntext: w1 w2\ntarget_text: ''\nstream: cross\n")
    flow = _explained(tmp_path, "--config", str(file))
    assert flow.tokens == ("w1", "w2") and flow.dst_tokens == ("[SEP]",) and flow.stream == "cross"
    assert _explained(tmp_path, "w4 w1 w2", "--config", str(file)).tokens == ("w4", "w1", "w2")
    file.write_text(f"model: {vit}\nimage: {photos[0]}\nmaps: [attn]\n")
    assert _explained(tmp_path, "--config", str(file)).settings["pixels"]["grid"] == [3, 3]


def test_image_files(vit: str, photos: list[str], tmp_path: Path) -> None:
    model = ll.load_model(vit, device="cpu")
    pictures = [Image.open(path) for path in photos]
    flow = _explained(tmp_path, "--image", photos[0], "--model", vit, "--device", "cpu")
    _same(flow, ll.attribute(model, pictures[0], progress=False))
    assert "<title>lig_lens: one.png</title>" in (tmp_path / "f.html").read_text()
    asked = ["--maps", "attn", "--attn-baseline", "corrupted", "--corrupted", photos[1]]
    flow = _explained(tmp_path, "--image", photos[0], "--model", vit, "--device", "cpu", *asked)
    options = {"maps": "attn", "attn_baseline": "corrupted", "progress": False}
    _same(flow, ll.attribute(model, pictures[0], corrupted=pictures[1], **options))


def test_an_image_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    from lig_lens.inputs.image_files import open_image

    exif = Image.Exif()
    exif[0x0112] = 6  # the right side is up
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (20, 30)


def _error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(["explain", *arguments, "--no-progress"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("lig-lens: error: ")
    return line


def test_files_that_are_no_images(vit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, cut = tmp_path / "a.png", tmp_path / "b.png"
    text.write_text("no image")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(cut)
    cut.write_bytes(cut.read_bytes()[:400])
    for path in (text, cut, tmp_path):
        assert f"--image: {str(path)!r} cannot be read as an image (" in _error(capsys, "--image", str(path))


def test_an_image_is_not_written_over(photos: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = _error(capsys, "--image", photos[0], "--out", photos[0])
    assert "is the image to be explained itself" in line


def test_without_pillow_its_install_is_named(
    photos: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "needs the package 'pillow'" in _error(capsys, "--image", photos[0])


def test_prompts_of_another_kind_than_the_model_takes(
    bart: str, vit: str, photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved("LlamaForCausalLM", tmp_path, **GQA)
    llama = str(tmp_path)
    assert "one stack of blocks: leave it out" in _error(capsys, "w1", "--target-text", "w2", "--model", llama)
    assert "--target-text TEXT, what the decoder has written" in _error(capsys, "w1 w2", "--model", bart)
    assert "is an image, and this model takes text" in _error(capsys, "--image", photos[0], "--model", llama)
    assert "lig-lens explain --image takes one" in _error(capsys, "a cat", "--model", vit)


def test_boundaries_of_a_stream(bart: str, capsys: pytest.CaptureFixture[str]) -> None:
    for stream, hook in (("encoder", "attn.hook_z"), ("decoder", "self_attn.hook_z"), ("cross", "cross_attn.hook_z")):
        assert run(["boundaries", bart, "--stream", stream]) == 0
        assert f" {hook} " in capsys.readouterr().out
    assert run(["boundaries", bart, "--stream", "crosss"]) == 2
    assert "Did you mean 'cross'?" in capsys.readouterr().err
