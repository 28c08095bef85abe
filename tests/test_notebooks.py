"""The notebooks run, print what is shown, stay small, and are in step with their sources."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
from test_docs import assert_same_text

FOLDER = Path(__file__).parents[1] / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))


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
    return "".join(out["text"] for out in cell.get("outputs", []) if out["output_type"] == "stream")


def test_there_are_notebooks() -> None:
    assert [path.stem for path in SOURCES] == sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    assert len(SOURCES) == 4


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_in_step_with_its_source(path: Path, build: ModuleType) -> None:
    """If not: python notebooks/build.py NAME."""
    cells = [[(cell.cell_type, cell.source) for cell in book.cells] for book in (build.read(path), shown(path))]
    assert cells[0] == cells[1]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_outputs_are_shown_and_small(path: Path, build: ModuleType) -> None:
    assert path.with_suffix(".ipynb").stat().st_size < build.LARGEST
    figures = [out["data"] for cell in shown(path).cells for out in cell.get("outputs", []) if "data" in out]
    figures = [data for data in figures if "application/vnd.plotly.v1+json" in data]
    assert figures and all("image/png" in data for data in figures)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_runs_and_prints_what_is_shown(path: Path, build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLOTLY_RENDERER", "plotly_mimetype")
    notebook = build.execute(build.read(path))
    assert len(nbformat.writes(notebook).encode()) < build.LARGEST
    for number, (found, kept) in enumerate(zip(notebook.cells, shown(path).cells, strict=True)):
        assert_same_text(printed(found), printed(kept), f"{path.name}, cell {number}")
