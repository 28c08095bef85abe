"""Reads an explorer page's picture and what it tells, and compares both with a Flow's tensors.

Where a line or circle stands is read from the picture: from the names of the tokens and of the first and last row.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from decimal import Decimal

import explorer_oracle as oracle
import pytest

import lig_lens
from lig_lens.show.plots.style import show_token

RED, BLUE, WHITE, GREY = "#b2182b", "#2166ac", "#ffffff", "#d0d7de"
READ = """([count, told]) => {
    const [svg, tip] = [document.querySelector("#graph svg"), document.querySelector("#tip")];
    const hover = (target, clientX, clientY) => {
        if (!told) return "";
        [tip.textContent, tip.hidden] = ["told before", true];
        target.dispatchEvent(new PointerEvent("pointermove", { bubbles: true, clientX, clientY }));
        return tip.hidden ? "" : tip.textContent;
    };
    const attributes = (element) => Object.fromEntries(Array.from(element.attributes, (one) => [one.name, one.value]));
    const all = (selector, read) => [...svg.querySelectorAll(selector)].map(read);
    const names = all("text[data-token]", (text) => [Number(text.dataset.token), Number(text.getAttribute("x"))]);
    const ends = all("text[font-style=italic]:not([data-token])", (text) => Number(text.getAttribute("y")) - 4);
    const lines = (selector) => all(selector, (path) => ({ ...attributes(path), text: hover(path, -9, -9) }));
    const frame = svg.getBoundingClientRect();
    const row = (r) => ends[0] + (r * (ends[1] - ends[0])) / (count - 1);
    return {
        names, ends, edges: lines("path[data-edge]"), steps: lines("path[data-path]"),
        discs: all("path[pointer-events=none]", attributes),
        nodes: names.flatMap(([i, x]) => Array.from({ length: count }, (_, r) =>
            [[r, i], hover(svg, frame.left + x, frame.top + row(r))])),
    };
}"""


@dataclass(frozen=True)
class Line:
    row: int
    src: int
    dst: int
    colour: str
    dashed: bool
    width: float
    opacity: float
    text: str

    @property
    def key(self):
        return self.row, self.src, self.dst, self.dashed


@dataclass(frozen=True)
class Picture:
    """Of a page that is drawn upwards: its lines, what each node tells, its circles by node (colour, radius)."""

    edges: list[Line]
    steps: list[Line]
    told: dict[tuple[int, int], str]
    discs: dict[tuple[int, int], tuple[str, float]]


def picture_of(page, flow, told=True):
    """Reads the picture; without the pointer on everything, which takes longer, where nothing `told` is wanted."""
    low, _, count = oracle.rows_of(flow.layers)
    found = page(READ, [count, told])
    bottom, top = found["ends"]

    def node(x, y):
        row = (y - bottom) / (top - bottom) * (count - 1)
        assert abs(row - round(row)) < 0.02
        return round(row), min(found["names"], key=lambda name: abs(name[1] - x))[0]

    def line(path):
        numbers = [float(number) for number in re.findall(r"-?[\d.]+", path["d"])]
        (row, src), (_, dst) = node(*numbers[:2]), node(*numbers[-2:])
        width, opacity = float(path["stroke-width"]), float(path["stroke-opacity"])
        dashed = "stroke-dasharray" in path
        return Line(low.index(row), src, dst, path["stroke"], dashed, width, opacity, path["text"])

    discs = {}
    for path in found["discs"]:
        for x, y, radius in re.findall(r"M(-?[\d.]+) (-?[\d.]+)a([\d.]+)", path["d"]):
            where = node(float(x) + float(radius), float(y))
            assert where not in discs
            discs[where] = path["fill"], float(radius)
    edges, steps = ([line(path) for path in found[kind]] for kind in ("edges", "steps"))
    return Picture(edges, steps, {tuple(at): text for at, text in found["nodes"]}, discs)


def number_in(text):
    """A number as the page writes it, without its unit."""
    return Decimal(text.strip().removesuffix("%").replace("−", "-"))


def is_percent(text, share):
    """Whether a text is a share, as exactly as it is written; – for one of nothing."""
    if math.isnan(share):
        return text == "–"
    size, number = abs(share) * 100, number_in(text)
    last_place = 10.0 ** number.as_tuple().exponent
    assert text.endswith("%") and last_place <= max(1.0, size) / (10 if size >= 0.1 else 1) * 1.01
    return abs(float(number) - 100 * share) <= 0.501 * last_place + 2e-4 * size


def is_gap(text, gap):
    number = number_in(text)
    return abs(float(number) - gap) <= 0.501 * 10.0 ** number.as_tuple().exponent


def tells(text, told, unit="column"):
    """Whether two lines of a tip are the numbers of an edge."""
    numbers, *gap = text.split("\n")
    value, share = re.fullmatch(r"value (\S+), share (\S+)", numbers).groups()
    assert float(number_in(value)) == pytest.approx(told.value, rel=1e-4, abs=1e-9) and is_percent(share, told.share)
    if told.gap is None:
        assert not gap
        return
    (gap,) = gap
    number, above = re.fullmatch(rf"gap of the {unit} (\S+?)(, above the tolerance)?", gap).groups()
    assert is_gap(number, told.gap) and bool(above) == (not told.converged)


def everything_is_told(page, flow):
    """Put the pointer on every edge and path of a page, and compare what is told with the tensors."""
    choice = oracle.Choice.of(page("ligLens.state"))
    picture = picture_of(page, flow)
    assert picture.edges or picture.steps
    expected = oracle.edges_of(flow, choice)
    for line in picture.edges:
        _edge_is_told(flow, choice, line, expected[line.key][0])
    if picture.steps:
        _steps_are_told(flow, choice, picture.steps, page.state("k"))
    return picture


def named(flow, i):
    return f"‘{show_token(flow.tokens[i], 24)}’ ({i})"


def _edge_is_told(flow, choice, line, passing):
    first, *lines = line.text.split("\n")
    head = choice.head_in(line.row)
    way = (
        "by skip connection and bias"
        if line.dashed
        else "through the block"
        if head is None
        else f"through head {head}"
    )
    src, dst = (named(flow, i) for i in (line.src, line.dst))
    assert first == f"Block {flow.layers[line.row]}: {src} → {dst}, {way}"
    if choice.node and oracle.follows(flow, choice):
        share, *lines = lines
        below = line.row < choice.node[0]
        what = "of the chosen token comes this way" if below else f"of {dst} comes from the chosen token this way"
        assert share.endswith(f" {what}") and is_percent(share.removesuffix(f" {what}"), passing)
    if line.dashed and oracle.past_of(flow, choice.map, line.row) is None:
        assert lines == ["nothing moves it: it keeps what it has"]
        return
    told = oracle.told_of(flow, choice.map, line.row, "past" if line.dashed else head, line.src, line.dst)
    tells("\n".join(lines), told, "layer" if choice.map == "metric" else "column")


def _steps_are_told(flow, choice, lines, k):
    shares = lig_lens.flow.compose.shares(flow, choice.map)
    paths = flow.paths(choice.node[1], k=k, stop=flow.layers[0] + choice.node[0], rule=choice.map)
    taken = defaultdict(list)
    for number, path in enumerate(paths):
        for step in path.steps:
            taken[step.layer, step.head, step.src, step.dst].append(number)
    form = (
        r"Paths? ([\d, ]+): (\S+) of the chosen token\n"
        r"Block (\d+)(?:, head (\d+)|, skip and bias): (.*), (\S+) of the step"
    )
    for line in lines:
        numbers, weight, layer, head, ends, share = re.fullmatch(form, line.text).groups()
        head = None if head is None else int(head)
        assert int(layer) == flow.layers[line.row] and ends == f"{named(flow, line.src)} → {named(flow, line.dst)}"
        by = taken[int(layer), head, line.src, line.dst]
        assert [int(number) - 1 for number in numbers.split(", ")] == by
        assert is_percent(weight, sum(paths[number].weight for number in by))
        part = shares.skip[line.row] if head is None else shares.heads[line.row, head, line.src]
        assert is_percent(share, float(part[line.dst]))
