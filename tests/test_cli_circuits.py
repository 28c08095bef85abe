"""`lig-lens patch` and `lig-lens compare`, on the packaged model and with configs."""

import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import lig_lens
from lig_lens.cli.configs import CircuitConfig, load_config, merge_settings
from lig_lens.cli.main import run

CONFIGS = Path(__file__).parents[1] / "configs"
PROMPTS = [
    "lamp lake mouse farm bell corn frog fox egg leaf map cup flute door gold egg",
    "lamp lake mouse egg bell corn frog fox farm leaf map cup flute door gold egg",
]
ANSWERS = ["--answer", "leaf", "--wrong", "bell", "--no-progress"]


def _error(capsys, arguments: list[str]) -> str:
    assert run(arguments) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == "" and line.startswith("lig-lens: error: ")
    return line


def test_patch(capsys, tmp_path):
    files = ["--json", str(tmp_path / "p.json"), "--html", str(tmp_path / "p.html")]
    assert run(["patch", *PROMPTS, *ANSWERS, "--top", "3", *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("activation patching of head outputs (hook_z): 136 measured; logit_difference('leaf',")
    assert lines[2].split() == ["where", "metric", "gained:", "patched", "-", "corrupted"]
    effects = lig_lens.patching.patch(
        lig_lens.load_model("induction"), *PROMPTS, lig_lens.logit_difference("leaf", "bell"), progress=False
    )
    index, value = effects.top(1)[0]
    assert lines[3].split()[-1] == f"{value:+#.3g}" and effects.label(index) in lines[3]
    assert sum("at '" in line for line in lines) == 3
    assert json.loads((tmp_path / "p.json").read_text())["on"] == "heads_by_pos"
    assert "Activation patching" in (tmp_path / "p.html").read_text()


@pytest.mark.parametrize("at, on", [("heads", "heads"), ("resid_pre", "positions"), ("edges_patched", "edges")])
def test_patch_elsewhere(capsys, tmp_path, at: str, on: str):
    out = tmp_path / "p.json"
    assert run(["patch", *PROMPTS, *ANSWERS, "--at", at, "--layers", "1", "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    assert document["on"] == on and document["layers"] == [1]


def test_compare_from_a_config(capsys, tmp_path):
    files = ["--json", str(tmp_path / "c.json"), "--html", str(tmp_path / "c.html")]
    assert run(["compare", "--config", str(CONFIGS / "induction.yaml"), "--no-progress", *files]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Against edge knock-out, logit_difference('leaf', 'bell')")
    document = json.loads((tmp_path / "c.json").read_text())
    assert list(document["agreement"]) == ["LIG by message", *lig_lens.interventions.scores.SCORES]
    assert f"{document['agreement']['LIG by message']['pearson']:+.3f}" in out
    page = (tmp_path / "c.html").read_text()
    assert (
        "LIG by message" in page
        and " against edge knock-out" in page
        and "metric lost: clean \\u2212 knocked out" in page
    )


@pytest.mark.parametrize("name", ["ioi", "induction"])
def test_configs(name: str):
    settings = merge_settings(CircuitConfig, load_config(CONFIGS / f"{name}.yaml", CircuitConfig))
    assert settings.clean and settings.corrupted and settings.answer
    keys = {field.alias or key for key, field in CircuitConfig.model_fields.items()}
    assert set(YAML(typ="safe", pure=True).load(CONFIGS / f"{name}.yaml")) <= keys


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["patch"], "The clean prompt is missing"),
        (["patch", PROMPTS[0]], "The corrupted prompt is missing"),
        (["patch", *PROMPTS, "--wrong", "bell"], "--wrong 'bell' is given without --answer"),
        (["patch", *PROMPTS, *ANSWERS, "--at", "hook_q"], "Unknown at 'hook_q'"),
        (["patch", *PROMPTS, *ANSWERS, "--top", "many"], "--top: 'many' is not a number"),
        (["patch", PROMPTS[0], "lamp lake", *ANSWERS], "corrupted has 3 tokens, the prompt 17"),
        (["patch", *PROMPTS, "--answer", "leaf map", "--no-progress"], "'leaf map' is 2 tokens"),
        (["patch", *PROMPTS, *ANSWERS, "--json", "/no/such/folder/x.json"], "--json"),
        (["compare", *PROMPTS, *ANSWERS, "--edges", "0"], "--edges"),
        (["patch", *PROMPTS, *ANSWERS, "--at", "edges", "--noising"], "--noising goes with activations"),
        (["compare", "--config", str(CONFIGS / "default.yaml")], "unknown key"),
    ],
)
def test_bad_input(capsys, arguments: list[str], message: str):
    assert message in _error(capsys, arguments)
