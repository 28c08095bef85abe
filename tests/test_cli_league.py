"""`lig-lens league`: configs, flags, files and what is refused."""

from pathlib import Path

import pytest
from checkpoints import SMALL, saved
from ruamel.yaml import YAML

import lig_lens as ll
from lig_lens.cli.configs import LeagueConfig, load_config, merge_settings
from lig_lens.cli.main import run

CONFIGS = Path(__file__).parents[1] / "configs"
TEXTS = ["w1 w5 w9 w3 w7 w2", "w4 w4 w8 w30 w11", "w6 w12 w3 w2 w1 w0 w9 w9"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    saved("BertForSequenceClassification", folder, **SMALL, num_labels=3)
    return folder


def test_the_command(capsys, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n\n")
    (tmp_path / "words.txt").write_text("w1\t2.0\nw9\t-1\n")
    config = tmp_path / "league.yaml"
    config.write_text(
        f"model: {folder}\ninputs: texts.txt\nlexicon: words.txt\nmethods: [ca_lig mix=0.0, ca_lig mix=1.0]\n"
        "replacers: [mask, mean]\nmeasures: [deletion, insertion, lexicon_sign]\nfractions: [0.2, 0.5]\ntol: 0.01\n"
    )
    monkeypatch.chdir(tmp_path)
    files = ["--json", "l.json", "--markdown", "l.md"]
    assert run(["league", "--config", "league.yaml", "--no-progress", *files]) == 0
    out = capsys.readouterr().out
    league = ll.League.load("l.json")
    assert league.methods == ("ca_lig mix=0.0", "ca_lig mix=1.0") and league.inputs == tuple(TEXTS)
    assert league.measures == ("deletion", "insertion", "lexicon_sign") and league.settings["fractions"] == [0.2, 0.5]
    assert (tmp_path / "l.md").read_text() == league.to_markdown() and league.to_markdown() in out
    more = "--count|2|--methods|ca_lig mix=0.5 heads=max|--measures|deletion|--fractions|0.3|--max-nodes|99".split("|")
    assert run(["league", "--config", "league.yaml", "--no-progress", *more, "--json", "m.json"]) == 0
    small = ll.League.load("m.json")
    assert small.methods == ("ca_lig heads=max",)  # without what is usual
    assert len(small.inputs) == 2 and small.settings["explain_class"]["max_nodes"] == 99


@pytest.mark.parametrize("name", ["league-sentiment", "league-digits"])
def test_configs(name: str):
    settings = merge_settings(LeagueConfig, load_config(CONFIGS / f"{name}.yaml", LeagueConfig))
    assert settings.count == 200 and settings.methods and settings.replacers
    assert YAML(typ="safe", pure=True).load(CONFIGS / f"{name}.yaml")["seed"] == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--inputs", "nowhere.txt"], "inputs 'nowhere.txt': No such file or directory. Name one of movie_sentences"),
        (["--inputs", "empty.txt"], "is empty"),
        (["--inputs", "t.txt", "--count", "9"], "count=9 is more than the 1 inputs"),
        (["--inputs", "t.txt", "--lexicon", "t.txt"], "line 1: 'w1 w2': write a word, a tab and a number"),
        (["--inputs", "t.txt", "--fractions", "0.5,2"], "--fractions: Input should be less than 1"),
        (["--inputs", "t.txt", "--fractions", "half"], "--fractions: 'half' is not a number"),
        (["--inputs", "t.txt", "--json", "t.txt"], "is the file of inputs itself"),
        (["--inputs", "t.txt", "--measures", "best"], "Unknown measure 'best'"),
    ],
)
def test_bad_flags(capsys, tmp_path: Path, folder: Path, monkeypatch, arguments: list[str], message: str):
    (tmp_path / "t.txt").write_text("w1 w2\n")
    (tmp_path / "empty.txt").write_text("\n")
    monkeypatch.chdir(tmp_path)
    assert run(["league", "--model", str(folder), "--no-progress", *arguments]) == 2
    assert message in capsys.readouterr().err
