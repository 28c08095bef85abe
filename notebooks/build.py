"""Run the notebooks and write their .ipynb with outputs: python notebooks/build.py [01_quickstart ...].

The .py files are the source (jupytext's percent format). Figures are kept twice: as plotly's data, which Jupyter draws
with hovers, and as a picture for viewers that run no script. Pictures need chromium; without it those of the last run
stay out.
"""

import base64
import html
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jupytext
import nbclient
import nbformat

FOLDER = Path(__file__).resolve().parent
SOURCES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
LARGEST = 1_000_000  # bytes of a notebook with its outputs
_PLOTLY = "application/vnd.plotly.v1+json"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def read(path: Path) -> nbformat.NotebookNode:
    """Cells of a source as a notebook without outputs, the same at every call."""
    notebook = jupytext.read(path)
    notebook.metadata = {
        "jupytext": {"formats": "ipynb,py:percent"},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"
        cell.metadata = {}
    return nbformat.from_dict(notebook)


def execute(notebook: nbformat.NotebookNode, timeout: int = 600) -> nbformat.NotebookNode:
    """Run all cells in a fresh kernel and an empty folder; an error in a cell is raised."""
    # plotly's data alone: other renderers add its script to the outputs.
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"
    with tempfile.TemporaryDirectory() as folder:
        client = nbclient.NotebookClient(
            notebook,
            timeout=timeout,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
        )
        client.execute()
    for cell in notebook.cells:
        # What goes to stderr (progress, notices of other packages) is not part of the text.
        cell["outputs"] = [out for out in cell.get("outputs", []) if out.get("name") != "stderr"]
        if cell.cell_type != "code":
            del cell["outputs"]
    return notebook


def add_pictures(notebook: nbformat.NotebookNode, browser: str) -> None:
    """Put a PNG beside every figure of plotly's and every page in a frame."""
    import plotly.graph_objects as go

    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            frame = re.search(r'<iframe srcdoc="([^"]*)"', data.get("text/html", ""))
            picture = None
            if _PLOTLY in data:
                picture = draw(go.Figure(data=data[_PLOTLY]["data"], layout=data[_PLOTLY]["layout"]), browser)
            elif frame:
                picture = screenshot(html.unescape(frame[1]), 1200, 900, browser)
            if picture is not None:
                data["image/png"] = base64.b64encode(picture).decode()


def draw(figure: Any, browser: str) -> bytes:
    """A plotly figure as PNG, in the size of its layout."""
    width, height = (int(figure.layout[side] or default) for side, default in (("width", 700), ("height", 450)))
    body = figure.to_html(full_html=False, include_mathjax=False, config={"displayModeBar": False})
    return screenshot(f"<meta charset=utf-8><body style='margin:0'>{body}", width, height, browser)


def screenshot(page: str, width: int, height: int, browser: str, link: str = "") -> bytes:
    """A page as PNG, opened with `link` behind its address."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        file, picture = Path(folder) / "page.html", Path(folder) / "page.png"
        file.write_text(page, encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=4000"]
        flags += [f"--screenshot={picture}", f"--window-size={width},{height}", file.as_uri() + link]
        subprocess.run([browser, *flags], check=True, capture_output=True, timeout=120)
        image = Image.open(picture).convert("RGB")
    small = io.BytesIO()
    _with_palette(image).save(small, "PNG", optimize=True)
    return small.getvalue()


def _with_palette(image: Any) -> Any:
    """In 256 colours, a third of the bytes: the 128 most frequent exactly, so that no 0 gets a tint, and 128 more."""
    import numpy as np
    from PIL import Image

    pixels = np.asarray(image).reshape(-1, 3)
    colours, which, counts = np.unique(pixels, axis=0, return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    kept, others = colours[order[:128]], colours[order[128:]]
    if len(others):
        rest = Image.fromarray(others[None]).quantize(128, dither=Image.Dither.NONE)
        kept = np.concatenate([kept, np.array(rest.getpalette(), dtype=np.uint8).reshape(-1, 3)[:128]])
    distance = ((colours[:, None].astype(int) - kept[None]) ** 2).sum(-1)
    nearest = distance.argmin(1).astype(np.uint8)[which.ravel()]
    result = Image.fromarray(nearest.reshape(image.height, image.width), "P")
    result.putpalette(kept.tobytes())
    return result


def main(names: list[str]) -> None:
    """Run some notebooks, or all."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    for source in SOURCES:
        if names and source.stem not in names:
            continue
        begun = time.monotonic()
        notebook = execute(read(source))
        took = time.monotonic() - begun
        if browser is not None:
            add_pictures(notebook, browser)
        text = nbformat.writes(notebook) + "\n"
        source.with_suffix(".ipynb").write_text(text, encoding="utf-8")
        size = len(text.encode())
        print(f"{source.stem}: {took:.0f} s, {size / 1e3:.0f} kB" + (" TOO LARGE" if size > LARGEST else ""))


if __name__ == "__main__":
    main(sys.argv[1:])
