"""Fills the explorer's page."""

import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from lig_lens.files import write_atomic
from lig_lens.flow.flow import Flow
from lig_lens.relevance.relevance import Relevance
from lig_lens.show.explorer.classes import class_contents
from lig_lens.show.explorer.contents import contents_of
from lig_lens.show.explorer.labelled import labelled
from lig_lens.show.plots.style import DIVERGING

Explored = Flow | Sequence[Flow] | Mapping[str, Flow] | Relevance | Sequence[Relevance] | Mapping[str, Relevance]
# In the order in which they build on each other.
_FLOW_SCRIPTS: tuple[str, ...] = (
    "common.js",
    "arrays.js",
    "compose.js",
    "data.js",
    "scene.js",
    "draw.js",
    "heatmap.js",
    "table.js",
    "input.js",
    "save.js",
    "main.js",
)
_RELEVANCE_SCRIPTS: tuple[str, ...] = ("common.js", "arrays.js", "relevance.js")
# Characters that could end a script element, or that a script takes for line ends.
_IN_SCRIPT = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}


@dataclass(frozen=True)
class Explorer:
    """A page with everything in it; notebooks show it in a frame.

    Attributes:
        html: the page.
        height: of the frame in a notebook, in pixels.
    """

    html: str
    height: int = 900

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to a file, in one step.

        Raises:
            InputError: `path` cannot be written.
        """
        return write_atomic(path, self.html.encode("utf-8"))

    def _repr_html_(self) -> str:
        """What a notebook shows: the page in a frame of its own, so that neither touches the other."""
        page = html.escape(self.html, quote=True)
        return (
            f'<iframe srcdoc="{page}" title="lig_lens explorer" '
            f'style="width: 100%; height: {self.height}px; border: 1px solid #d0d7de; border-radius: 6px"></iframe>'
        )

    def __repr__(self) -> str:
        return f"Explorer({len(self.html) / 1e6:.1f} MB): show it in a notebook, or save('page.html')"


def explore(results: Explored, *, title: str | None = None, height: int = 900) -> Explorer:
    """Make a page to explore Flows in: token-to-token flow layer by layer, heads, paths, exact numbers.

    Of Relevances it shows the text (or image) on the colours of its relevance, layer by layer, several methods side by
    side, and exact numbers.

    Args:
        results: one, several, or several by label; Flows, or Relevances. Those of one prompt (baselines, targets,
            methods) and those of several prompts can be chosen in the page.
        title: of the page; the first prompt by default.
        height: of the frame in a notebook, in pixels.

    Up to a million numbers of a Flow are written as float32, more as float16 (three digits), relative to the largest
    of their layer. Above eight million, single heads are left out where a Flow has them, and the page says so.

    A page of Flows opens with the composed map `conserving`; where that leaves out what tokens keep (the mlp map's
    baseline is `att_itb_a0`), or cannot be made, with the first map of the Flow.

    Raises:
        InputError: no result, results of both kinds, or a Flow that is too large for a page.
    """
    named = labelled(results)
    flows = {label: one for label, one in named.items() if isinstance(one, Flow)}
    relevances = {label: one for label, one in named.items() if isinstance(one, Relevance)}
    if flows:
        contents = contents_of(flows)
        page, style, scripts = "page.html", _asset("style.css"), _FLOW_SCRIPTS
        header: object = contents.header
        arrays, first = contents.arrays, contents.header["samples"][0]["label"]
    else:
        of_classes, arrays = class_contents(relevances)
        header, first = of_classes, of_classes["samples"][0]["label"]
        page, scripts = "relevance.html", _RELEVANCE_SCRIPTS
        style = _asset("style.css") + _asset("relevance.css").replace("@@gradient@@", ", ".join(DIVERGING))
    parts = {
        "title": html.escape(f"lig_lens: {first}" if title is None else title),
        "style": style,
        "header": json.dumps(header, ensure_ascii=False, allow_nan=False).translate(_IN_SCRIPT),
        "arrays": "\n".join(f'<script type="text/plain" id="{key}">{text}</script>' for key, text in arrays.items()),
        "script": "\n".join(_asset(name) for name in scripts),
    }
    # In one pass, so that nothing that was put in is taken for a place.
    return Explorer(re.sub(r"@@(\w+)@@", lambda place: parts[place[1]], _asset(page)), height)


def write_explorer(results: Explored, path: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Write the page of `explore` to a file, which opens without network.

    Args:
        results: see `explore`.
        path: replaced in one step.
        title: see `explore`.

    Raises:
        InputError: see `explore`, or `path` cannot be written.
    """
    return explore(results, title=title).save(path)


def _asset(name: str) -> str:
    return (resources.files("lig_lens.show.explorer") / "assets" / name).read_text(encoding="utf-8")
