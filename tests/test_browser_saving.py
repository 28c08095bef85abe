"""What leaves the explorer's page, and its table: against the Flow's tensors."""

import csv
import io
import math
import re
from urllib.parse import parse_qs
from xml.etree import ElementTree

import explorer_oracle as oracle
import pytest
from browser_pages import chained
from drawn import BLUE, RED, is_gap, is_percent, named, number_in
from PIL import Image
from plot_cases import metric_flow

pytestmark = [
    pytest.mark.program,
    pytest.mark.filterwarnings("ignore::lig_lens.CancellationWarning"),  # random Flows
]

HEADS = {"skip and bias": "past", "all heads": None}
CSV_HEADS = {"past": "past", "all": None}


def copied(page, button, done):
    """What a button copies."""
    page.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page("() => navigator.clipboard.writeText('nothing')")
    page.page.click(button)
    page.page.locator("#status", has_text=done).wait_for()
    return page("() => navigator.clipboard.readText()")


def all_edges(flow, map, row):
    """Exact numbers of all edges of a layer, each head by itself, strongest first."""
    heads = oracle.heads_of(flow, map, row)
    found = {}
    for dst in flow.destinations:
        for head in [None] if map == "block" else range(len(heads)):
            for src in range(len(flow.tokens)):
                found[head, src, dst] = oracle.told_of(flow, map, row, head, src, dst)
        if oracle.past_of(flow, map, row) is not None:
            found["past", dst, dst] = oracle.told_of(flow, map, row, "past", dst, dst)
    found = {key: told for key, told in found.items() if told.value}
    return dict(sorted(found.items(), key=lambda item: -abs(item[1].value)))


@pytest.mark.parametrize("map", ["attn", "mlp", "block", "product", "conserving", "metric"])
def test_the_table_is_the_tensors(open_page, map: str):
    flow = chained() if map != "metric" else metric_flow(("the", "cat", "sat", "on", "mats"), (0, 1, 2), metric="logit")
    page = open_page(flow)
    for scale in ("share", "absolute"):
        page.set(map=map, scale=scale, layer=1)
        expected = all_edges(flow, map, 1)
        seen = f"60 of {len(expected)}" if len(expected) > 60 else str(len(expected))
        assert page.page.inner_text("#table-title") == f"{seen} edges of block 1, map {map}"
        rows = page("""() => [...document.querySelectorAll("#table tbody tr")].map((row) =>
            [...row.cells].map((cell) => [cell.textContent, cell.className, getComputedStyle(cell).color]))""")
        assert len(rows) == min(60, len(expected))
        for cells, strongest in zip(rows, expected.values(), strict=False):
            block, head, src, dst, value, share, gap = (text for text, *_ in cells)
            src, dst = (int(name.split()[-1]) for name in (src, dst))
            told = expected[HEADS[head] if head in HEADS else int(head), src, dst]
            assert block == "1" and float(number_in(value)) == pytest.approx(told.value, rel=1e-4)
            assert abs(told.value) == pytest.approx(abs(strongest.value), rel=1e-5)
            assert is_percent(share, told.share)
            if told.gap is None:
                assert gap == "–"
            else:
                assert is_gap(gap.removesuffix(" !"), told.gap) and gap.endswith(" !") == (not told.converged)
            coloured, number = (5, told.share) if scale == "share" else (4, told.value)
            sign, colour = ("positive", RED) if number > 0 else ("negative", BLUE)
            rgb = "rgb({}, {}, {})".format(*bytes.fromhex(colour[1:]))
            assert cells[coloured][1:] == [sign, rgb] and not cells[9 - coloured][1]


def test_the_status_names_the_strongest_edge(open_page):
    flow = chained()
    page = open_page(flow)
    page.set(map="attn", node={"row": 3, "pos": 4}, layer=2)
    into = {key: told for key, told in all_edges(flow, "attn", 2).items() if key[2] == 4 and key[1] != 4}
    (head, src, _), told = next(iter(into.items()))
    words = f"Strongest edge between tokens: {named(flow, src)} to ‘the’ (4) through L2H{head}, "
    text = page.page.inner_text("#status")
    assert words in text
    assert float(number_in(text.split(words)[1].split(". ")[0])) == pytest.approx(told.value, rel=1e-4)


def test_the_table_sorts_and_leaves_as_csv(open_page):
    flow = chained()
    page = open_page(flow)
    page.set(map="block")
    column = "() => [...document.querySelectorAll('#table tbody tr')].map(r => Number(r.dataset.value))"
    sizes = [abs(value) for value in page(column)]
    assert sizes == sorted(sizes, reverse=True)
    page.page.get_by_role("button", name="value").click()
    assert page(column) == sorted(page(column), reverse=True)
    page.page.get_by_role("button", name="source").click()
    names = page("() => [...document.querySelectorAll('#table tbody tr')].map(r => r.cells[2].textContent)")
    places = [int(name.split()[-1]) for name in names]
    assert places == sorted(places)
    name, data = page.saved("#save-csv")
    assert name == "lig_lens-tiny-block.csv" and copied(page, "#copy-csv", "49 rows copied.") == data.decode()
    rows = list(csv.DictReader(io.StringIO(data.decode())))
    assert [int(row["src"]) for row in rows] == places and len(rows) == 49


@pytest.mark.parametrize("map", ["attn", "mlp", "block", "product", "conserving"])
def test_copied_rows_are_the_tensors(open_page, map: str):
    flow = chained()
    page = open_page(flow)
    page.set(map=map, layer=2)
    expected = all_edges(flow, map, 2)
    text = copied(page, "#copy-csv", f"{len(expected)} rows copied.")
    assert text.split("\n")[0] == "layer,head,src,src_token,dst,dst_token,value,share,gap,converged"
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == len(expected)
    for row in rows:
        head, src, dst = row["head"], int(row["src"]), int(row["dst"])
        told = expected.pop((CSV_HEADS[head] if head in CSV_HEADS else int(head), src, dst))
        assert row["layer"] == "2" and (row["src_token"], row["dst_token"]) == (flow.tokens[src], flow.tokens[dst])
        assert float(row["value"]) == pytest.approx(told.value, rel=1e-5)
        assert float(row["share"]) == pytest.approx(told.share, rel=1e-4) and told.gap is not None
        assert float(row["gap"]) == pytest.approx(told.gap, rel=1e-6)
        assert row["converged"] == str(told.converged).lower()


def test_links_are_copied(open_page):
    page = open_page(chained())
    page.set(map="product", node={"row": 2, "pos": 3}, scale="absolute", threshold=0.25)
    link = copied(page, "#copy-link", "Link copied.")
    address, state = link.split("#")
    assert address == page.page.url.split("#")[0]
    expected = {"map": ["product"], "node": ["2,3"], "scale": ["absolute"], "threshold": ["0.25"]}
    assert parse_qs(state) == expected
    page("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('not allowed')); }")
    page.set(map="block")
    page.page.click("#copy-link")
    page.page.locator("#status", has_text="Link copied.").wait_for()
    assert parse_qs(page("() => navigator.clipboard.readText()").split("#")[1])["map"] == ["block"]


TEXT = "{http://www.w3.org/2000/svg}text"


def test_the_saved_svg_says_what_it_shows(open_page):
    flow = chained()
    page = open_page(flow)
    prompt = " ".join(flow.tokens)
    name, data = page.saved("#save-svg")
    assert name == "lig_lens-tiny-conserving.svg" and b'transform="translate' not in data
    *_, first, second = (text.text for text in ElementTree.fromstring(data).iter(TEXT))
    gap = f"worst gap {max(float(gap.max()) for gap in flow.gap.values()):.0e} (tol 0.001)"
    assert first == prompt
    assert second.startswith("composed: conserving · share of the step · threshold 20% · attn itb, mlp zero, block itb")
    assert "tiny · 7 tokens · 3 blocks" in second and gap in second
    page.set(map="attn", scale="absolute", layer=2, head=1, node={"row": 3, "pos": 4}, threshold=0.5)
    *_, first, second = (text.text for text in ElementTree.fromstring(page.saved("#save-svg")[1]).iter(TEXT))
    assert first == f"{prompt}, ‘the’ (4) leaving block 2 chosen, head 1 of block 2"
    assert second.startswith("attn: sources → heads · in units of vector length (l2) · threshold 50% of max · ")


def test_the_saved_svg_is_the_picture(open_page):
    page = open_page(chained())
    count = page("document.querySelectorAll('#graph svg *').length")
    picture = ElementTree.fromstring(page.saved("#save-svg")[1])
    assert len(list(picture.iter())) - 1 == count + 2
    lines = [line for line in picture.iter() if "data-edge" in line.attrib]
    shown = page(
        "[...document.querySelectorAll('#graph [data-edge]')].map(e => [e.getAttribute('d'), e.getAttribute('stroke')])"
    )
    assert [[line.get("d"), line.get("stroke")] for line in lines] == shown
    _, top, width, height = (float(number) for number in picture.get("viewBox").split())
    texts = [(float(text.get("x")), float(text.get("y"))) for text in picture.iter(TEXT)]
    assert all(0 <= x <= width and top < y < top + height for x, y in texts)


def test_the_saved_png_is_the_picture(open_page):
    page = open_page(chained())
    page.set(map="block")
    picture = ElementTree.fromstring(page.saved("#save-svg")[1])
    name, data = page.saved("#save-png")
    assert name == "lig_lens-tiny-block.png"
    image = Image.open(io.BytesIO(data)).convert("RGB")
    size = [2 * float(picture.get(side)) for side in ("width", "height")]
    assert image.size == tuple(math.floor(side) for side in size)
    colours = {colour: count for count, colour in image.getcolors(maxcolors=image.width * image.height)}
    assert len(colours) > 200 and max(colours, key=colours.get) == (255, 255, 255)
    # Where the SVG has the middle of a circle, there is its colour.
    top, seen = float(picture.get("viewBox").split()[1]), set()
    for path in picture.iter("{http://www.w3.org/2000/svg}path"):
        if path.get("pointer-events") and path.get("fill") in (RED, BLUE):
            for x, y, radius in re.findall(r"M(-?[\d.]+) (-?[\d.]+)a([\d.]+)", path.get("d")):
                if float(radius) > 3:
                    at = (round(2 * (float(x) + float(radius))), round(2 * (float(y) - top)))
                    assert image.getpixel(at) == tuple(bytes.fromhex(path.get("fill")[1:]))
                    seen.add(path.get("fill"))
    assert seen == {RED, BLUE}
