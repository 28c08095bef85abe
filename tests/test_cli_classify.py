"""`lig-lens classify`: what it passes on, prints and writes, and its errors."""

import importlib
import json
from pathlib import Path
from typing import Any

import image_models
import numpy as np
import pytest
import transformers
from checkpoints import SMALL, saved
from PIL import Image
from relevances import make_relevance

import lig_lens as ll
from lig_lens.cli.configs import ClassifyConfig, load_config, merge_settings
from lig_lens.cli.main import run
from lig_lens.relevance.faithfulness.measure import named
from lig_lens.relevance.relevance import Relevance


class Core:
    """Stands in for the loader and for `explain_class`, and keeps what it was asked."""

    def __init__(self) -> None:
        self.loaded: Any = None
        self.asked: dict[str, Any] | None = None
        self.prompt: Any = None

    def load_model(self, name: str, device: str | None = None, dtype: str | None = None) -> str:
        self.loaded = name
        return "model"

    def explain_class(self, model: Any, prompt: Any, **asked: Any) -> Any:
        self.prompt, self.asked = prompt, asked
        one = make_relevance()
        return one if isinstance(asked["method"], str) else [one, make_relevance(seed=1, method="rollout")]


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Core:
    core = Core()
    for module, name in (("models.loading", "load_model"), ("relevance.explain", "explain_class")):
        monkeypatch.setattr(importlib.import_module(f"lig_lens.{module}"), name, getattr(core, name))
    return core


def _error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(["classify", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()[-1]


def test_flags_reach_the_explanation(core: Core) -> None:
    flags = ["--model", "x", "--target", "1", "--against", "negative", "--baseline", "pad", "--tol", "0.01"]
    flags += ["--parameters", "mix=0.3,keep=positive, heads = max", "--max-nodes", "64", "--max-batch-tokens", "128"]
    assert run(["classify", "a b", *flags, "--no-progress"]) == 0
    assert (core.loaded, core.prompt) == ("x", "a b")
    assert core.asked == {
        "target": 1,
        "against": "negative",
        "method": "ca_lig",
        "baseline": "pad",
        "corrupted": None,
        "tol": 0.01,
        "max_nodes": 64,
        "max_batch_tokens": 128,
        "progress": False,
        "mix": 0.3,
        "keep": "positive",
        "heads": "max",
    }


def test_a_file_has_the_same_keys(core: Core, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("text: a b\nmodel: x\ntarget: 1\nmethod: [ca_lig]\nparameters: [mix=0.3, at=path]\ntop: 2\n")
    assert run(["classify", "--config", str(path), "--target", "positive"]) == 0
    assert core.asked is not None
    assert (core.prompt, core.asked["target"], core.asked["mix"], core.asked["at"]) == ("a b", "positive", 0.3, "path")
    assert merge_settings(ClassifyConfig, load_config(path, ClassifyConfig)).explain_arguments()["target"] == 1


def test_parameters_are_read_as_in_a_league() -> None:
    asked = ClassifyConfig(text="a", parameters=("every_layer=true", "mix=0.5", "heads=max", "name=nan"))
    expected = {"every_layer": True, "mix": 0.5, "heads": "max", "name": "nan"}
    assert asked.method_parameters() == expected == named("flow every_layer=true mix=0.5 heads=max name=nan")[1]
    for target, read in (("true", "true"), ("1e3", "1e3"), ("nan", "nan"), ("1", 1), ("-2", -2), ("1.0", "1.0")):
        assert ClassifyConfig(text="a", target=target).explain_arguments()["target"] == read


def test_scores_are_printed_and_files_named_last(
    core: Core, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    names = {"--out": "r.safetensors", "--json": "r.json", "--html": "r.html"}
    flags = [part for flag, name in names.items() for part in (flag, str(tmp_path / name))]
    assert run(["classify", "<b>a</b>", "--no-progress", *flags]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == "Wrote " + ", ".join(str(tmp_path / name) for name in names.values())
    assert "\n".join(lines) == make_relevance().table()
    assert Relevance.load(tmp_path / "r.safetensors").tokens == make_relevance().tokens
    assert json.loads((tmp_path / "r.json").read_text())["schema"] == "lig_lens.relevance"
    assert "<title>lig_lens: &lt;b&gt;a&lt;/b&gt;</title>" in (tmp_path / "r.html").read_text()


def test_several_methods_stand_side_by_side(
    core: Core, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lig_lens.registry import Entry
    from lig_lens.relevance import METHODS

    monkeypatch.setitem(METHODS._entries, "mine", Entry(object()))
    page = tmp_path / "r.html"
    assert run(["classify", "a", "--method", "ca_lig,mine", "--top", "2", "--html", str(page), "--no-progress"]) == 0
    assert core.asked is not None and core.asked["method"] == ["ca_lig", "mine"]
    out = capsys.readouterr().out
    assert "ca_lig  rollout" in out and "5 positions with smaller scores not shown." in out and page.is_file()
    line = _error(capsys, "a", "--method", "ca_lig,mine", "--out", str(tmp_path / "r.safetensors"))
    assert "--out holds one Relevance, and there are 2 methods (ca_lig, mine): name one" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "There is no prompt: give TEXT, or --image FILE"),
        ((" ",), "TEXT is empty"),
        (("a", "--method", "ca_lgi"), "Unknown method 'ca_lgi': use one of 'ca_lig'"),
        (("a", "--parameters", "mix"), "--parameters: 'mix' is not of the form name=value"),
        (("a", "--parameters", "mix="), "'mix=' is not of the form name=value"),
        (("a", "--parameters", "mix=1, mix=2"), "--parameters: 'mix' is given twice"),
        (("a", "--baseline", "pad", "--corrupted", "b"), "paths start in one place, drop one"),
        (("a", "--top", "0"), "--top: Input should be greater than or equal to 1"),
        (("a", "--max-nodes", "3"), "--max-nodes: Input should be greater than or equal to 7, not 3"),
        (("a", "--image", "x.png"), "TEXT goes with models of text"),
        (("--image", "none.png"), "there is no file 'none.png'"),
        (("a", "--out", "none/r"), "the folder 'none' does not exist"),
    ],
)
def test_bad_input_is_found_before_the_work(
    core: Core, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert message in _error(capsys, *arguments)
    assert core.loaded is None and core.asked is None


def test_a_classifier_of_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved("BertForSequenceClassification", tmp_path / "m", **SMALL, num_labels=3)
    model, file = str(tmp_path / "m"), tmp_path / "r.safetensors"
    flags = ("--model", model, "--device", "cpu", "--no-progress", "--target", "2")
    assert run(["classify", "w1 w2 w3", *flags, "--parameters", "mix=0.25", "--out", str(file)]) == 0
    found = Relevance.load(file)
    expected = ll.explain_class(ll.load_model(model), "w1 w2 w3", target=2, mix=0.25, progress=False)
    assert isinstance(expected, Relevance) and found.settings == expected.settings
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5, atol=1e-7)
    capsys.readouterr()
    line = _error(capsys, "w1", *flags[:-2], "--target", "awful")
    assert "target='awful' is no class of this model: it has 0" in line
    assert "has no parameter 'mxi'" in _error(capsys, "w1", *flags, "--parameters", "mxi=1")


def test_a_classifier_of_images(tmp_path: Path) -> None:
    image_models.saved("ViTForImageClassification", tmp_path / "m")
    transformers.ViTImageProcessorPil(size={"height": 12, "width": 12}).save_pretrained(tmp_path / "m")
    for name, seed in (("a.png", 0), ("b.png", 1)):
        pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    flags = ["--image", str(tmp_path / "a.png"), "--corrupted", str(tmp_path / "b.png"), "--model", str(tmp_path / "m")]
    files = ["--out", str(tmp_path / "r.safetensors"), "--html", str(tmp_path / "r.html")]
    assert run(["classify", *flags, *files, "--device", "cpu", "--no-progress", "--target", "1"]) == 0
    found = Relevance.load(tmp_path / "r.safetensors")
    assert found.of_image and found.settings["pixels"]["grid"] == [3, 3]
