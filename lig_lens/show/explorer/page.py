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
from lig_lens.show.explorer.contents import contents_of, labelled

# In the order in which they build on each other.
_SCRIPTS = ("compose.js", "data.js", "scene.js", "draw.js", "heatmap.js", "table.js", "input.js", "save.js", "main.js")
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


def explore(
    flows: "Flow | Sequence[Flow] | Mapping[str, Flow]", *, title: str | None = None, height: int = 900
) -> Explorer:
    """Make a page to explore Flows in: token-to-token flow layer by layer, heads, paths, exact numbers.

    Args:
        flows: one, several, or several by label. Those of one prompt (baselines, targets) and those of several prompts
            can be chosen in the page.
        title: of the page; the first prompt by default.
        height: of the frame in a notebook, in pixels.

    Up to a million numbers of a Flow are written as float32, more as float16 (three digits), relative to the largest
    of their layer. Above eight million, single heads are left out where a Flow has them, and the page says so.

    The page opens with the composed map `conserving`; where that leaves out what tokens keep (the mlp map's baseline is
    `att_itb_a0`), or cannot be made, with the first map of the Flow.

    Raises:
        InputError: no Flow, or one that is too large for a page.
    """
    contents = contents_of(labelled(flows))
    parts = {
        "title": html.escape(f"lig_lens: {contents.header['samples'][0]['label']}" if title is None else title),
        "style": _asset("style.css"),
        "header": json.dumps(contents.header, ensure_ascii=False, allow_nan=False).translate(_IN_SCRIPT),
        "arrays": "\n".join(
            f'<script type="text/plain" id="{key}">{text}</script>' for key, text in contents.arrays.items()
        ),
        "script": "\n".join(_asset(name) for name in _SCRIPTS),
    }
    # In one pass, so that nothing that was put in is taken for a place.
    return Explorer(re.sub(r"@@(\w+)@@", lambda place: parts[place[1]], _asset("page.html")), height)


def write_explorer(
    flows: "Flow | Sequence[Flow] | Mapping[str, Flow]", path: str | os.PathLike[str], *, title: str | None = None
) -> Path:
    """Write the page of `explore` to a file, which opens without network.

    Args:
        flows: see `explore`.
        path: replaced in one step.
        title: see `explore`.

    Raises:
        InputError: see `explore`, or `path` cannot be written.
    """
    return explore(flows, title=title).save(path)


def _asset(name: str) -> str:
    return (resources.files("lig_lens.show.explorer") / "assets" / name).read_text(encoding="utf-8")
