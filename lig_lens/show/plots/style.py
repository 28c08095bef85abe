"""What all figures share: colours, labels as markup, and the frame around a plot."""

import html
import math
import re
import textwrap
from collections.abc import Sequence

import plotly.graph_objects as go

from lig_lens.show.text import JOINS, show_token

# ColorBrewer's RdBu and Purples: told apart under the common kinds of colour blindness.
DIVERGING = ["#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#fafafa", "#fddbc7", "#f4a582", "#d6604d", "#b2182b"]
SEQUENTIAL = ["#fcfbfd", "#efedf5", "#dadaeb", "#bcbddc", "#9e9ac8", "#807dba", "#6a51a3", "#54278f", "#3f007d"]
# Okabe and Ito's colours without black and yellow, and two that were chosen to stay apart from them and each other
# for every kind of colour-blindness: any two differ by 16 in Lab or more, as Machado et al. simulate it.
QUALITATIVE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a2be2", "#774422"]
FONT = "Inter, 'Segoe UI', 'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif"
MONOSPACE = "'DejaVu Sans Mono', Menlo, Consolas, 'Liberation Mono', 'Courier New', monospace"
INK, QUIET, LINE, FAINT = "#24292f", "#6e7781", "#d0d7de", "#f3f4f6"
DARK = 0.6  # of the end of the diverging colours, from where letters are white
LETTER = 5.6  # pixels that a letter of a label is wide, on average
_EDGE = 12  # pixels between the heading and the figure's edges


def diverging(share: float) -> str:
    """The diverging colour of a value from -1 to 1; what is beyond has the colour at the end."""
    place = (min(1.0, max(-1.0, share)) + 1) / 2 * (len(DIVERGING) - 1)
    low = min(int(place), len(DIVERGING) - 2)
    ends = [[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in DIVERGING[low : low + 2]]
    mixed = [int(a + (b - a) * (place - low) + 0.5) for a, b in zip(*ends, strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def on_colour(share: float) -> str:
    """The colour of letters that can be read on `diverging(share)`."""
    return INK if abs(share) < DARK else "white"


def plain_text(plain: str) -> str:
    """`plain` so that plotly, which renders a small HTML, shows it letter by letter."""
    return html.escape(plain, quote=False)


def short(name: str, longest: int = 60) -> str:
    """A name of a model, metric or setting as text of a heading, cut where it is too long."""
    return plain_text(name if len(name) <= longest else name[: longest - 1] + "…")


def quiet(text: str) -> str:
    """Markup in a colour that steps back."""
    return f"<span style='color:{QUIET}'>{text}</span>"


def token_label(token: str, special: bool = False, position: int | None = None, longest: int = 14) -> str:
    """A token as the label of a tick: special ones in italics, marks of whitespace and its position quiet."""
    shown = show_token(token, longest)
    if special:
        label = f"<i>{quiet(plain_text(shown))}</i>"
    else:
        label = re.sub(f"^{JOINS}|[·↵⇥∅]+", lambda mark: quiet(mark[0]), plain_text(shown))
    return label if position is None else f"{label} {quiet(str(position))}"


def label_width(labels: Sequence[str]) -> float:
    """Pixels that the longest of some labels takes, about."""
    return LETTER * max(len(_bare(line)) for label in labels for line in label.split("<br>"))


def _bare(markup: str) -> str:
    """The letters of some markup."""
    return html.unescape(re.sub("<[^>]*>", "", markup))


def set_frame(
    figure: go.Figure,
    heading: str,
    facts: Sequence[str],
    *,
    width: float,
    height: float,
    left: float,
    right: float = 44.0,
    bottom: float = 60.0,
    above: float = 16.0,
) -> float:
    """Give a figure its size, fonts and heading; returns the margin above the plot.

    Args:
        figure: all but framed.
        heading: markup of the first line.
        facts: what the quiet lines below it list, as markup.
        width: of the plot without margins, in pixels, as all that follow.
        height: of the plot.
        left: margin for labels.
        right: margin.
        bottom: margin for labels.
        above: between heading and plot, for captions and a colour bar.
    """
    total = max(left + width + right, 560.0)
    lines = _wrap(facts, total - 2 * _EDGE)
    size = 16 if len(_bare(heading)) * 9.4 < total - 2 * _EDGE else 13
    top = 38.0 + 1.3 * size * len(lines) + above  # plotly spaces all lines as the first one's letters ask for
    text = "<br>".join([heading, *(f"<span style='font-size:12px;color:{QUIET}'>{line}</span>" for line in lines)])
    figure.update_layout(
        template="plotly_white",
        width=round(total),
        height=round(top + height + bottom),
        margin={"l": left, "r": total - left - width, "t": top, "b": bottom, "pad": 0},
        font={"family": FONT, "size": 12, "color": INK},
        paper_bgcolor="white",
        hoverlabel={"bgcolor": "white", "bordercolor": LINE, "font": {"family": FONT, "size": 12, "color": INK}},
        hoverlabel_align="left",
        # Upright in the margin, the buttons do not cover the heading of a narrow figure.
        modebar={
            "orientation": "v",
            "bgcolor": "rgba(0,0,0,0)",
            "color": LINE,
            "activecolor": QUIET,
            # The last one would upload the figure to plotly's cloud.
            "remove": ["select", "lasso", "sendChartToCloud"],
        },
    )
    figure.update_xaxes(title_font_size=12)
    figure.update_yaxes(title_font_size=12)
    common = {"text": text, "font": {"size": size, "color": INK}, "xanchor": "left", "yanchor": "top"}
    if "coloraxis" in figure.layout.to_plotly_json():
        # plotly moves a figure's own title when a colour bar lies below it.
        shifts = {"xshift": _EDGE - left, "yshift": top - 10}
        figure.add_annotation(x=0, y=1, xref="paper", yref="paper", align="left", showarrow=False, **common, **shifts)
    else:
        # Of several lines plotly puts the first one's baseline where the top should be.
        place = {"x": _EDGE / total, "y": 1 - 28 / (top + height + bottom), "xref": "container", "yref": "container"}
        figure.update_layout(title={**place, **common})
    return top


def _wrap(facts: Sequence[str], width: float) -> list[str]:
    """Facts on as few lines as hold them, broken between facts and, where one alone is too long, between words."""
    letters = math.floor(width / 6.1)
    lines: list[str] = []
    for fact in facts:
        length = len(_bare(fact))
        if lines and len(_bare(lines[-1])) + 3 + length <= letters:
            lines[-1] += f" · {fact}"
        else:
            lines += textwrap.wrap(fact, letters, break_long_words=False, break_on_hyphens=False) or [""]
    return lines
