"""What the explorer draws and tells in a real browser, against the Flow's tensors."""

import itertools
import re

import explorer_oracle as oracle
import pytest
import torch
from browser_pages import chained
from drawn import BLUE, GREY, RED, WHITE, everything_is_told, is_percent, named, number_in, picture_of, tells
from flows import make_flow
from plot_cases import metric_flow

pytestmark = [
    pytest.mark.program,
    pytest.mark.filterwarnings("ignore::lig_lens.CancellationWarning"),  # random Flows
]

WORDS = ("the", "cat", "sat", "on", "a", "mat")
MAPS = ("attn", "mlp", "block", "product", "conserving", "metric")


def flow_for(map):
    return metric_flow(WORDS, layers=(0, 1, 2), metric="logit") if map == "metric" else chained()


def choices(map):
    """States that show a map in every way: both scales, with a choice, one head alone, without skip edges."""
    for scale in ("share", "absolute"):
        yield {"scale": scale}
        yield {"scale": scale, "threshold": 0.2}
        for row, pos in ((0, 1), (2, 4), (3, 5)):
            yield {"scale": scale, "node": {"row": row, "pos": pos}}
        if map in ("metric", "mlp", "conserving"):
            yield {"scale": scale, "skip": False}
        if map not in ("mlp", "block"):
            yield {"scale": scale, "layer": 1, "head": 2}
            yield {"scale": scale, "layer": 1, "head": 2, "node": {"row": 2, "pos": 4}}


def shown(page, map, **changes):
    """Put a page in a state; what is not named is at its start."""
    start = {"map": map, "scale": "share", "layer": 0, "head": None, "node": None, "skip": True, "threshold": 0}
    page.set(**(start | changes))
    return oracle.Choice.of(start | changes)


@pytest.mark.parametrize("map", MAPS)
def test_lines_are_the_tensors(open_page, map: str):
    """Which are drawn, of which sign and width, and what they tell."""
    flow = flow_for(map)
    page = open_page(flow)
    for changes in choices(map):
        choice = shown(page, map, **changes)
        drawn = everything_is_told(page, flow).edges
        expected = oracle.edges_of(flow, choice)
        near = {key for key, (_, size) in expected.items() if abs(size - choice.threshold) < 1e-5}
        above = {key for key, (_, size) in expected.items() if size >= choice.threshold}
        keys = [line.key for line in drawn]
        assert len(set(keys)) == len(keys) and set(keys) ^ above <= near
        assert all(line.colour == (RED if expected[line.key][0] > 0 else BLUE) for line in drawn)
        _grow_with_size([(expected[line.key][1], line) for line in drawn], choice)


def _grow_with_size(lines, choice):
    """Whether lines are from 0.5 to 6 wide, evenly, and the darker the larger; other than what is chosen is pale."""
    top = max(size for size, _ in lines)
    followed = choice.node is not None and choice.map in ("product", "conserving")  # then on either scale in shares
    top = min(1.0, top) if choice.scale == "share" or followed else top
    opacities = {True: [], False: []}
    for size, line in sorted(lines, key=lambda pair: pair[0]):
        assert line.width == pytest.approx(0.5 + 5.5 * min(1.0, size / top), abs=0.06)
        touches = choice.node in ((line.row + 1, line.dst), (line.row, line.src))
        beside_head = choice.head is not None and line.row != choice.layer
        opacities[beside_head or (choice.map == "metric" and choice.node is not None and not touches)].append(
            line.opacity
        )
    for some in opacities.values():
        assert some == sorted(some) and (len(some) < 10 or len(set(some)) > 5)
    assert max(opacities[True], default=0) < 0.3
    assert choice.node is not None or max(opacities[False]) > 0.3


SIZES = {
    "linear": lambda size, largest, median: size / largest,
    "sqrt": lambda size, largest, median: (size / largest) ** 0.5,
    "pivot": lambda size, largest, median: size / (size + median),
}


@pytest.mark.parametrize("map", MAPS)
def test_circles_are_the_tensors(open_page, map: str):
    """Which are drawn, of which sign, how large, and what they tell."""
    flow = flow_for(map)
    page = open_page(flow)
    page.set(map=map, circle="linear")
    room = max(radius for _, radius in picture_of(page, flow, told=False).discs.values())
    states = [changes for changes in choices(map) if "threshold" not in changes]
    for changes, (circle, part) in zip(states, itertools.cycle(SIZES.items()), strict=False):
        choice = shown(page, map, circle=circle, **changes)
        expected = oracle.nodes_of(flow, choice)
        sizes = sorted(abs(value) for value in expected.values() if value)
        picture = picture_of(page, flow)
        assert len(picture.discs) == 4 * len(flow.tokens)
        for at, (colour, radius) in picture.discs.items():
            value = expected.get(at)
            if at == choice.node:
                continue
            assert colour == (WHITE if value is None else RED if value > 0 else BLUE if value < 0 else GREY)
            if value:
                size = part(abs(value), sizes[-1], sizes[len(sizes) // 2])
                assert radius == pytest.approx(max(0.8, room * size), abs=0.11)
        for at, text in picture.told.items():
            _node_is_told(flow, choice, at, text, expected.get(at))


def _node_is_told(flow, choice, at, text, value):
    (row, pos), last = at, len(flow.layers)
    place = "entering block 0" if row == 0 else f"between blocks {row - 1} and {row}"
    name, *meaning = text.split("\n")
    assert name == f"{named(flow, pos)} {f'leaving block {last - 1}' if row == last else place}"
    if value is None:
        assert not meaning
        return
    (meaning,) = meaning
    if choice.node and oracle.follows(flow, choice):
        if row == choice.node[0]:
            chosen = pos == choice.node[1]
            assert meaning == ("the chosen token" if chosen else "in the same row as the chosen token")
            return
        form = (
            r"(\S+) of the chosen token is from here"
            if row < choice.node[0]
            else r"(\S+) of this is from the chosen token"
        )
    elif choice.map == "mlp":
        form = r"(\S+) of what its output moves by comes through the heads"
    elif choice.map == "metric":
        form = r"(\S+) through this token"
    elif choice.node:
        form = r"(\S+): flow between it and the chosen token"
    else:
        form = r"gives (\S+) to the next row" + (", mean over destinations" if choice.scale == "share" else "")
    amount = re.fullmatch(form, meaning)[1]
    if amount.endswith("%"):
        assert is_percent(amount, value)
    else:
        assert choice.scale == "absolute" and float(number_in(amount)) == pytest.approx(value, rel=1e-4, abs=1e-9)


def test_messages_are_sent_from_their_token(open_page):
    flow = metric_flow(WORDS, metric="logit")
    flow.settings["split"] = "message"
    page = open_page(flow)
    assert all(" sent from here" in text for (row, _), text in picture_of(page, flow).told.items() if row < 2)


# The heatmaps.

# Read from a copy: the browser complains of canvases that are read often.
MIDDLES = """(canvas, { x, y, width, height }, columns, rows) => {
    const copy = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
    const context = copy.getContext("2d", { willReadFrequently: true });
    context.drawImage(canvas, 0, 0);
    const [wide, tall] = [width / columns, height / rows];
    const pixel = (i, j) => context.getImageData(x + (j + 0.5) * wide, y + (i + 0.5) * tall, 1, 1).data.slice(0, 3);
    return Array.from({ length: rows }, (_, i) => Array.from({ length: columns }, (_, j) => Array.from(pixel(i, j))));
}"""


def large_pixels(page, n_rows, n_columns):
    """Colours of the large heatmap in the middle of each cell, [row, column, channel]."""
    read = f"(canvas, [rows, columns]) => ({MIDDLES})(canvas, ligLens.large.box, columns, rows)"
    return page.page.locator("#large").evaluate(read, [n_rows, n_columns])


def small_pixels(page, n):
    """The same of every head's small heatmap."""
    box = "{ x: 0, y: 0, width: canvas.width, height: canvas.height }"
    read = f"(list, n) => list.map((canvas) => ({MIDDLES})(canvas, {box}, n, n))"
    return page.page.locator("#heads canvas").evaluate_all(read, n)


def channels(colour):
    return [int(colour[at : at + 2], 16) for at in (1, 3, 5)]


def are_colours_of(pixels, values):
    """Whether colours go from blue over pale to red as values do, and end at the largest."""
    pixels, values = torch.tensor(pixels).reshape(-1, 3), values.flatten()
    redness = pixels[:, 0] - pixels[:, 2]
    order = values.argsort()
    assert (redness[order].diff() >= -2).all() and len(redness.unique()) > min(20, len(values) / 2)
    strong = values.abs() > 0.02 * values.abs().max()
    assert (redness[strong].sign() == values[strong].sign()).all()
    assert pixels[values.abs().argmax()].tolist() == channels(RED if values[values.abs().argmax()] > 0 else BLUE)


@pytest.mark.parametrize("map", ["attn", "block", "product", "conserving", "metric"])
def test_heatmaps_are_the_tensors(open_page, map: str):
    """Rows are destinations, columns are sources; the colours of all heads end at one value, which the legend names."""
    flow = flow_for(map)
    page, n = open_page(flow), len(flow.tokens)
    page.set(map=map, scale="absolute", shared=False)
    legend = page.page.locator("#legend")
    for layer in range(3):
        page.set(layer=layer)
        heads = oracle.heads_of(flow, map, layer)
        are_colours_of(large_pixels(page, n, n), heads.sum(0).T)
        largest = float(f"{float(heads.sum(0).abs().max()):.3g}")
        low, high = (float(number_in(text)) for text in legend.inner_text().split())
        assert (low, high) == (pytest.approx(-largest), pytest.approx(largest))
        if map != "block":
            small = small_pixels(page, n)
            are_colours_of(small, heads.mT)
            page.set(head=1)
            cells = large_pixels(page, n, n)
            assert cells == small[1]
            largest = float(f"{float(heads.abs().max()):.3g}")
            assert float(number_in(legend.inner_text().split()[1])) == pytest.approx(largest)
            page.set(head=None)
    assert "rows: destinations, columns: sources" in page.page.inner_text("#note")


def test_the_legend_ends_where_colours_do(open_page):
    flow = chained()
    for tensor in (flow.attn, flow.mlp, flow.skip, flow.bias, flow.block):
        tensor.abs_()
    page, n = open_page(flow), len(flow.tokens)
    for map, layer in (("block", 0), ("attn", 2), ("conserving", 1)):
        page.set(map=map, layer=layer, scale="share")
        heads = oracle.heads_of(flow, map, layer).sum(0) / oracle.divisors_of(flow, map, layer, None)
        are_colours_of(large_pixels(page, n, n), heads.T)
        low, high = page.page.inner_text("#legend").split()
        assert is_percent(high, float(heads.max())) and is_percent(low, -float(heads.max()))
    shades = page("getComputedStyle(document.querySelector('#legend i')).backgroundImage")
    assert 0 < shades.index("33, 102, 172") < shades.index("178, 24, 43")
    flow.block[0, 2, 5] = -0.9 * flow.block[0, :, 5].sum()
    page = open_page(flow)
    page.set(map="block", layer=0)
    assert page.page.inner_text("#legend").split() == ["−100%", "+100%"]
    assert "Colours saturate at ±100%" in page.page.inner_text("#note")


def test_the_heatmap_of_parts(open_page):
    flow = chained()
    page = open_page(flow)
    for scale in ("share", "absolute"):
        page.set(map="mlp", layer=1, scale=scale)
        parts = torch.cat([flow.mlp[1], flow.skip[1:2], flow.bias[1:2]])
        are_colours_of(large_pixels(page, 5, 7), parts if scale == "absolute" else flow.shares("mlp")[1])


def test_names_beside_the_heatmap(open_page):
    """Names of destinations stand at the rows, of sources at the columns; hidden tokens have none."""
    page = open_page(chained())
    page("""() => {
        const fill = CanvasRenderingContext2D.prototype.fillText;
        CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
            const at = this.getTransform().transformPoint(new DOMPoint(x, y));
            (window.written ??= []).push([text, at.x, at.y]);
            return fill.call(this, text, x, y);
        };
    }""")
    page.set(map="block", special=True)
    box, side = page("ligLens.large.box"), page("ligLens.large.cellWidth")
    names = ["the 1", "cat 2", "sat 3", "the 4", "‑s 5"]
    beside, below = (page("window.written")[start : start + 5] for start in (0, 5))
    assert [text for text, *_ in beside] == [text for text, *_ in below] == names
    for i, ((_, x, y), (_, right, bottom)) in enumerate(zip(beside, below, strict=True)):
        assert x < box["x"] and y == pytest.approx(box["y"] + (i + 0.5) * side, abs=0.1)
        assert bottom > box["y"] + box["height"] and right == pytest.approx(box["x"] + (i + 0.5) * side, abs=0.1)


TIPS = """() => {
    const [canvas, tip] = [document.querySelector("#large"), document.querySelector("#tip")];
    const { box, cells, cellWidth, cellHeight } = ligLens.large;
    const frame = canvas.getBoundingClientRect();
    return cells.rows.map((_, i) => cells.columns.map((_, j) => {
        const clientX = frame.left + box.x + (j + 0.5) * cellWidth;
        const clientY = frame.top + box.y + (i + 0.5) * cellHeight;
        tip.textContent = "told before";
        canvas.dispatchEvent(new PointerEvent("pointermove", { bubbles: true, clientX, clientY }));
        return tip.textContent;
    }));
}"""


@pytest.mark.parametrize("map", MAPS)
def test_every_cell_is_told(open_page, map: str):
    flow = flow_for(map)
    page = open_page(flow)
    for head in (None, 2) if map not in ("mlp", "block") else (None,):
        page.set(map=map, layer=1, head=head)
        told = page(TIPS)
        for i, row in enumerate(told):
            for j, text in enumerate(row):
                name, numbers = text.split("\n", 1)
                if map == "mlp":
                    _part_is_told(flow, i, j, name, numbers)
                    continue
                assert name == f"{named(flow, j)} → {named(flow, i)}"
                tells(numbers, oracle.told_of(flow, map, 1, head, j, i), "layer" if map == "metric" else "column")


def _part_is_told(flow, part, dst, name, numbers):
    assert name == f"{[*(f'head {h}' for h in range(3)), 'skip', 'bias'][part]} → {named(flow, dst)}"
    value = float(flow.columns("mlp")[1, part, dst])
    gap, converged = float(flow.gap["mlp"][1, dst]), bool(flow.converged["mlp"][1, dst])
    tells(numbers, oracle.Told(value, float(flow.shares("mlp")[1, part, dst]), gap, converged))


# What is left out.


def test_only_the_strongest_of_many_are_drawn(open_page):
    flow = make_flow(tokens=[f"w{i}" for i in range(16)], layers=(0, 1, 2))
    page = open_page(flow)
    status = page.page.locator("#status")
    choice = shown(page, "block")
    assert "600 edges drawn, the strongest of each block, of 768 above the threshold." in status.inner_text()
    drawn = {line.key for line in picture_of(page, flow, told=False).edges}
    sizes = oracle.edges_of(flow, choice)
    for row in range(3):
        strongest = sorted((key for key in sizes if key[0] == row), key=lambda key: -sizes[key][1])[:200]
        assert {key for key in drawn if key[0] == row} == set(strongest)
    choice = shown(page, "block", threshold=0.2)
    above = sum(size >= 0.2 for _, size in sizes.values())
    assert 0 < above < 600 and f"{above} edges drawn, {768 - above} below the threshold." in status.inner_text()


def test_the_threshold_is_that_of_the_slider(open_page):
    flow = chained()
    page = open_page(flow)
    page.set(map="block", scale="absolute")
    page.page.locator("#threshold").fill("70")
    assert page.page.inner_text("#threshold-value") == "34% of max"
    sizes = oracle.edges_of(flow, oracle.Choice("block", scale="absolute"))
    drawn = {line.key for line in picture_of(page, flow, told=False).edges}
    assert drawn == {key for key, (_, size) in sizes.items() if size >= 0.7**3} and len(drawn) < 100


def test_punctuation_and_special_tokens_are_hidden(open_page):
    flow = make_flow(tokens=("[CLS]", "the", "cat", "!?", "sat", "it's", "."), layers=(0, 1))
    page = open_page(flow)

    def names():
        return [
            int(name)
            for name in page("[...document.querySelectorAll('#graph [data-token]')].map(e => e.dataset.token)")
        ]

    assert names() == list(range(7))
    page.page.check("#punct")
    assert names() == [0, 1, 2, 4, 5] and "2 tokens hidden" in page.page.inner_text("#status")
    shown(page, "block")
    ends = {end for line in everything_is_told(page, flow).edges for end in (line.src, line.dst)}
    assert ends == {0, 1, 2, 4, 5}
    rows = page(
        "[...document.querySelectorAll('#table tbody tr')].map(r => r.cells[2].textContent + r.cells[3].textContent)"
    )
    assert len(rows) == 25 and not any("!" in row or "." in row for row in rows)
    page.page.check("#special")
    assert names() == [1, 2, 4, 5]
    page = open_page(make_flow(tokens=(".", "!"), layers=(0, 1)))
    page.page.check("#punct")
    assert names() == [0, 1] and "all tokens would be hidden, so none is" in page.page.inner_text("#status")


def test_the_key_says_what_colours_mean(open_page):
    page = open_page(chained())
    for scale, red, blue in (
        ("share", "sign of the total", "opposite sign"),
        ("absolute", "raises the target", "lowers it"),
    ):
        page.set(map="block", scale=scale)
        assert f"red {red}, blue {blue}" in page.page.inner_text("#key")
    colours = page("['positive', 'negative'].map(n => getComputedStyle(document.querySelector('#key .' + n)).color)")
    assert colours == ["rgb(178, 24, 43)", "rgb(33, 102, 172)"]


def test_followed_shares_look_alike_on_both_scales(open_page):
    page = open_page(chained())
    page.click_node(3, 5)
    pictures = []
    for scale in ("share", "absolute"):
        page.set(scale=scale, threshold=0.02)
        pictures.append(page("[...document.querySelectorAll('#graph [data-edge]')].map(e => e.outerHTML)"))
    assert pictures[0] == pictures[1] and len(pictures[0]) > 20
