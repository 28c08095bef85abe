"""The notebooks run, print what is shown, stay small, and are in step with their sources."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
import torch
import transformers
from test_docs import assert_same_text

import lig_lens

FOLDER = Path(__file__).parents[1] / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
# Those of language models; classifiers have no such line.
SWITCHED = [path for path in SOURCES if path.stem != "05_classes"]
pytestmark = pytest.mark.program

PLOTLY = "application/vnd.plotly.v1+json"


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebooks_build", FOLDER / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["notebooks_build"] = module
    spec.loader.exec_module(module)
    return module


def shown(path: Path) -> Any:
    return nbformat.read(path.with_suffix(".ipynb"), as_version=4)


def printed(cell: Any) -> str:
    """What a cell prints, its tables as text, and the titles of its figures."""
    parts = []
    for out in cell.get("outputs", []):
        data = out.get("data", {})
        if out["output_type"] == "stream":
            parts.append(out["text"])
        elif PLOTLY in data:
            layout = data[PLOTLY]["layout"]
            # Grids of panels have their heading as the first annotation.
            parts.append(re.sub("<[^>]*>", " ", (layout.get("title") or layout["annotations"][0])["text"]))
        elif "<table" in data.get("text/html", ""):
            parts.append(data["text/plain"])
    return "\n".join(parts)


def test_there_are_notebooks() -> None:
    assert [path.stem for path in SOURCES] == sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    assert len(SOURCES) == 5


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_in_step_with_its_source(path: Path, build: ModuleType) -> None:
    """If not: python notebooks/build.py NAME."""
    cells = [[(cell.cell_type, cell.source) for cell in book.cells] for book in (build.read(path), shown(path))]
    assert cells[0] == cells[1]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_outputs_are_shown_and_small(path: Path, build: ModuleType) -> None:
    assert path.with_suffix(".ipynb").stat().st_size < build.LARGEST
    figures = [out["data"] for cell in shown(path).cells for out in cell.get("outputs", []) if "data" in out]
    figures = [data for data in figures if PLOTLY in data]
    assert figures and all("image/png" in data for data in figures)


@pytest.mark.long
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_runs_and_prints_what_is_shown(path: Path, build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLOTLY_RENDERER", "plotly_mimetype")
    notebook = build.execute(build.read(path))
    assert len(nbformat.writes(notebook).encode()) < build.LARGEST
    for number, (found, kept) in enumerate(zip(notebook.cells, shown(path).cells, strict=True)):
        assert_same_text(printed(found), printed(kept), f"{path.name}, cell {number}")


@pytest.mark.long
@pytest.mark.parametrize("path", SWITCHED, ids=lambda path: path.stem)
def test_one_line_switches_the_model(
    path: Path, build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As `gpt2` would: 12 layers, 12 heads, tokens that begin with a space; only that weights are random."""
    load, tokenizer = lig_lens.load_model, lig_lens.load_model("smollm2").tokenizer
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=12, n_head=12, n_embd=48, vocab_size=len(tokenizer))
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    monkeypatch.setattr(lig_lens, "load_model", lambda name: load(str(tmp_path / name) if name == "gpt2" else name))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    switch = re.compile(r"= .*  # with a network: (.*)")
    cells = [cell.source for cell in build.read(path).cells if cell.cell_type == "code"]
    assert any(switch.search(cell) for cell in cells)
    # Two of the sentences that one cell goes through; all of them are run above.
    cells = [cell.replace("in sentences:", "in sentences[:2]:") for cell in cells]
    for cell in cells:
        exec(compile(switch.sub(r"= \1", cell), path.name, "exec"), names)
