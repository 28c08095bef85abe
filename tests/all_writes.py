"""Every way in which the package writes a file, for the tests that hold for all of them.

As a program, `python all_writes.py FOLDER` tries each on a place that cannot hold it and prints what came of it.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import plotly.graph_objects as go
from flows import make_flow
from plot_cases import make_effects
from relevances import make_relevance

import lig_lens
from lig_lens.flow import file as flow_file
from lig_lens.flow.header import LABELS
from lig_lens.flow.labels import CELLS, TENSORS
from lig_lens.plots import write_html

FLOW = make_flow(tokens=tuple(f"w{i}" for i in range(12)), layers=(0, 1))
EFFECTS = make_effects("edges", FLOW.tokens)
RELEVANCE = make_relevance()


def write_growing(path: Path) -> None:
    """As `attribute(out=...)` does, layer by layer."""
    tensors = {name: getattr(FLOW, name) for name in TENSORS if getattr(FLOW, name) is not None}
    for group in CELLS:
        tensors |= {f"{group}.{name}": value for name, value in getattr(FLOW, group).items()}
    labels = {name: getattr(FLOW, name) for name in LABELS}
    with flow_file.growing(path, labels, {name: tensor.shape for name, tensor in tensors.items()}) as put:
        for name, tensor in tensors.items():
            for index, layer in enumerate(tensor):
                put(name, index, layer)


# Under the name of the file: what writes it, and what reads it and fails if it is not whole.
WRITES: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
    "flow.safetensors": (FLOW.save, lig_lens.Flow.load),
    "grown.safetensors": (write_growing, lig_lens.Flow.load),
    "relevance.safetensors": (RELEVANCE.save, lig_lens.Relevance.load),
    "relevance.json": (RELEVANCE.to_json, lambda path: json.loads(path.read_text())),
    "relevance.html": (RELEVANCE.explore().save, lambda path: _ends(path)),
    "coloured.html": (lig_lens.relevance_html(RELEVANCE).save, lambda path: _ends(path)),
    "flow.json": (FLOW.to_json, lambda path: json.loads(path.read_text())),
    "effects.json": (EFFECTS.to_json, lambda path: json.loads(path.read_text())),
    "explorer.html": (FLOW.explore().save, lambda path: _ends(path)),
    "figure.html": (lambda path: write_html(go.Figure(), path), lambda path: _ends(path)),
}


def _ends(path: Path) -> None:
    assert path.read_text().rstrip().endswith("</html>"), f"{path} is cut short"


def _fail(folder: Path) -> dict[str, tuple[str, str]]:
    """What each write raises, if anything: its type and what it says."""
    raised = {}
    for name, (write, _) in WRITES.items():
        try:
            write(folder / name)
            raised[name] = ("nothing", "")
        except Exception as error:
            raised[name] = (type(error).__name__, str(error))
    return raised


def write_forever(folder: Path) -> None:
    """Write all of them over and over."""
    while True:
        for name, (write, _) in WRITES.items():
            write(folder / name)


if __name__ == "__main__":
    print(json.dumps(_fail(Path(sys.argv[1]))))
