"""The page of relevance: as a file it holds the numbers, and in a browser it shows them."""

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plot_cases import HOSTILE
from relevances import PATCHES, make_relevance
from test_explorer import decoded, header_of

import lig_lens as ll
from lig_lens.cli.main import run
from lig_lens.errors import InputError
from lig_lens.inputs.pictures import picture_of
from lig_lens.show.explorer import explore, write_explorer
from lig_lens.show.plots.style import diverging

PICTURE = picture_of(torch.rand(3, 8, 12, generator=torch.Generator().manual_seed(0)))


def image_relevance(seed: int = 0, picture: str = PICTURE) -> ll.Relevance:
    return make_relevance(PATCHES, seed, settings={"pixels": {"grid": [2, 3], "image": picture}, "baseline": "zero"})


# As a file.


def test_numbers_are_written_exactly() -> None:
    relevance = make_relevance()
    page = relevance.explore().html
    (sample,) = header_of(page)["samples"]
    (view,) = sample["views"]
    assert view["names"] == {"scores": ["scores"], "rolled": ["0", "1"], "token": ["0", "1", "output"]}
    for name in ("scores", "rolled", "token"):
        expected = getattr(relevance, name)
        found = decoded(page, view["arrays"][name])
        np.testing.assert_array_equal(found.ravel(), expected.numpy().ravel())
    assert [one["total"] for one in view["totals"]] == relevance.total.tolist()  # type: ignore[union-attr]
    assert [token["text"] for token in sample["tokens"]][1:6] == ["what", "a", "wonder", "ful", "film"]
    assert sample["label"] == "what a wonderful film"
    assert json.loads(view["settings"]) == relevance.settings
    assert "worst gap 2.0e-04 (tol 0.001)" in view["facts"] and "ca_lig, mix 0.5, keep signed" in view["facts"]


def test_methods_of_one_prompt_stand_together() -> None:
    other = make_relevance(("another", "text"))
    first, second = header_of(explore([make_relevance(), make_relevance(method="rollout"), other]).html)["samples"]
    assert [view["label"] for view in first["views"]] == ["ca_lig", "rollout"] and len(second["views"]) == 1
    (named,) = header_of(explore({"one": make_relevance(), "two": make_relevance()}).html)["samples"]
    assert [view["label"] for view in named["views"]] == ["one", "two"]


def test_each_image_stands_for_itself() -> None:
    other = picture_of(torch.rand(3, 8, 12, generator=torch.Generator().manual_seed(1)))
    relevances = [image_relevance(), image_relevance(1), image_relevance(picture=other)]
    samples = header_of(explore(relevances).html)["samples"]
    assert [(one["image"], len(one["views"])) for one in samples] == [(PICTURE, 2), (other, 1)]


def test_an_image_comes_with_its_patches() -> None:
    (sample,) = header_of(explore(image_relevance()).html)["samples"]
    assert sample["grid"] == [2, 3] and sample["image"] == PICTURE
    assert "data:image" not in sample["views"][0]["settings"]
    (text,) = header_of(explore(make_relevance()).html)["samples"]
    assert text["grid"] is None and text["image"] is None
    odd = make_relevance(PATCHES, settings={"pixels": {"image": "javascript:alert(1)"}})
    assert header_of(explore(odd).html)["samples"][0]["image"] is None


def test_hostile_text_stays_text() -> None:
    relevance = make_relevance(HOSTILE, method="</script><img>", target="<b>", model_name="]]>")
    page = explore({HOSTILE[0]: relevance}, title="<title>").html
    assert "<img" not in page and "alert(1)</script>" not in page and "&lt;title&gt;" in page
    assert header_of(page)["samples"][0]["tokens"][0]["text"] == HOSTILE[0]
    half = explore(make_relevance(("a", "\ud83d"))).html  # of a pair, which cannot be written
    assert header_of(half)["samples"][0]["tokens"][1]["text"] == "\\ud83d"


def test_page_asks_nobody_for_anything() -> None:
    page = explore(image_relevance()).html
    assert "default-src 'none'" in page and "@@" not in page
    assert not re.findall(r"https?://[^\"'\s]+", page)
    assert not re.search(r"<(link|img|iframe)\b", page) and "@import" not in page and "fetch(" not in page


def test_in_a_notebook_and_as_a_file(tmp_path: Path) -> None:
    page = make_relevance().explore(height=500)
    (inner,) = re.findall(r'srcdoc="([^"]*)"', page._repr_html_())
    assert html.unescape(inner) == page.html and "height: 500px" in page._repr_html_()
    assert write_explorer(make_relevance(), tmp_path / "a.html").read_text(encoding="utf-8") == page.html


def test_flows_and_relevances_have_pages_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from flows import make_flow

    with pytest.raises(InputError, match="got Flows and Relevances, which have pages of their own"):
        explore([make_flow(), make_relevance()])  # type: ignore[arg-type, list-item]
    flow, relevance = (str(tmp_path / name) for name in ("f.safetensors", "r.safetensors"))
    make_flow().save(flow)
    make_relevance().save(relevance)
    page = tmp_path / "p.html"
    assert run(["view", relevance, relevance, "--html", str(page), "--no-open"]) == 0
    assert [view["label"] for view in header_of(page.read_text())["samples"][0]["views"]] == [
        "ca_lig (1)",
        "ca_lig (2)",
    ]
    assert run(["view", flow, relevance, "--html", str(page), "--no-open"]) == 2
    assert "pages of their own" in capsys.readouterr().err
    assert run(["view", str(page), "--html", str(tmp_path / "q.html"), "--no-open"]) == 2


# In a browser: an oracle that reads the page.

READ = """() => {
    const all = (selector, read) => [...document.querySelectorAll(selector)].map(read);
    const cells = (box) => all(`${box} [data-position]`, (one) =>
        [Number(one.dataset.position), getComputedStyle(one).backgroundColor, one.textContent, one.dataset.value]);
    const [note, low, high] = ["#note", "#low", "#high"].map((one) => document.querySelector(one).textContent);
    return {
        text: cells("#text"), layers: cells("#layers"), methods: cells("#methods"), note, low, high,
        rows: all("#table tbody tr", (row) => [...row.children].map((cell) => cell.textContent)),
        plain: ligLens.plainText(), csv: ligLens.csv(),
    };
}"""


def rgb(share: float) -> str:
    colour = diverging(share)
    return f"rgb({', '.join(str(int(colour[at : at + 2], 16)) for at in (1, 3, 5))})"


def near(colour: str, share: float) -> bool:
    """Whether two colours are the same but for rounding."""
    found, expected = ([int(number) for number in re.findall(r"\d+", one)[:3]] for one in (colour, rgb(share)))
    return max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def is_shown(found: list[Any], relevance: ll.Relevance, values: torch.Tensor, top: float) -> None:
    assert [position for position, *_ in found] == list(range(len(relevance.tokens)))
    for position, colour, *_ in found:
        if not relevance.special[position]:
            assert near(colour, float(values[position]) / top), (position, colour)


def own_top(relevance: ll.Relevance, values: torch.Tensor) -> float:
    return float(values[..., ~torch.tensor(relevance.special)].abs().max())


@pytest.mark.program
def test_what_is_shown_is_what_the_relevance_holds(open_page: Any) -> None:
    relevance, other = make_relevance(), make_relevance(seed=1, method="rollout")
    assert relevance.rolled is not None and relevance.token is not None and other.token is not None
    page = open_page([relevance, other])
    shown = page(READ)
    top = own_top(relevance, relevance.scores)
    is_shown(shown["text"], relevance, relevance.scores, top)
    assert [text for *_, text, _ in shown["text"]] == ["[CLS]", "what", "a", "wonder", "ful", "film", "[SEP]"]
    assert number(shown["high"]) == pytest.approx(top, rel=1e-3) and number(shown["low"]) == -number(shown["high"])
    assert shown["plain"] == "what a wonderful film"
    # Layers stand upwards: the last comes first.
    rows = [shown["layers"][at : at + 7] for at in range(0, 14, 7)]
    for row, values in zip(rows, relevance.rolled.flip(0), strict=True):
        is_shown(row, relevance, values, own_top(relevance, relevance.rolled))
        np.testing.assert_allclose([float(cell[3]) for cell in row], values, rtol=1e-6)
    for row, one in zip((shown["methods"][:7], shown["methods"][7:]), (relevance, other), strict=True):
        is_shown(row, one, one.scores, own_top(one, one.scores))
    # A row of the table: position, token, score, rolled and token in the first layer.
    for position, row in enumerate(shown["rows"]):
        assert int(row[0]) == position
        expected = [relevance.scores[position], relevance.rolled[0, position], relevance.token[0, position]]
        np.testing.assert_allclose([number(cell) for cell in row[2:]], expected, rtol=1e-3)
    # Another method, and its boundaries.
    page.set(view=1, part="token", row=2)
    shown = page(READ)
    is_shown(shown["text"], other, other.token[2], own_top(other, other.token))
    found = re.fullmatch(
        r"token, output: sum of all positions (\S+); the number's change is (\S+), gap 2.0e-4", shown["note"]
    )
    assert found is not None
    for text in found.groups():
        assert number(text) == pytest.approx(float(other.token[2].sum()), rel=1e-3)
    csv = [line.split(",") for line in shown["csv"].splitlines()[1:]]
    np.testing.assert_allclose([float(line[-1]) for line in csv], other.token[2], rtol=1e-6)


@pytest.mark.program
def test_controls_do_what_they_say(open_page: Any) -> None:
    relevance, other = make_relevance(), make_relevance(seed=1, method="rollout")
    page = open_page([relevance, other])
    page.page.select_option("#part", label="token")
    page.page.locator("#layer").fill("1")
    assert (page.state("part"), page.state("row")) == ("token", 1)
    assert page.page.locator("#layer-value").inner_text() == "1"
    page.page.select_option("#view", label="rollout")
    assert page.state("view") == 1 and page.state("part") == "token"
    page.page.locator("#methods button").first.click()
    assert page.state("view") == 0
    page.page.locator("#layers button").first.click()  # the row at the top
    assert (page.state("part"), page.state("row")) == ("token", 2)
    page.page.locator("#text span").nth(3).hover()
    tip = page.page.locator("#tip").inner_text()
    assert relevance.token is not None
    lines = tip.split("\n")
    assert lines[0] == "‘wonder’ (3)"
    assert number(lines[1].removeprefix("score ")) == pytest.approx(float(relevance.scores[3]), rel=1e-3)
    assert number(lines[2].removeprefix("token, output: ")) == pytest.approx(float(relevance.token[2, 3]), rel=1e-3)
    page.page.locator("#table th button").nth(2).click()  # strongest first
    scores = [number(row[2]) for row in page(READ)["rows"]]
    assert [abs(score) for score in scores] == sorted((abs(score) for score in scores), reverse=True)
    page.page.click("#help-button")
    assert page.page.locator("#help").is_visible()


@pytest.mark.program
def test_an_image_is_shown_below_its_patches(open_page: Any) -> None:
    relevance = image_relevance()
    page = open_page(relevance)
    found = page(READ)["text"]
    is_shown(found, relevance, relevance.scores, own_top(relevance, relevance.scores))
    sizes = page("[...document.querySelectorAll('#text img')].map((one) => one.naturalWidth)")
    assert sizes == [12, 12]  # the image, and the one below the patches
    assert page.page.locator("#copy-text").is_hidden() and page.page.locator("#by-method").is_hidden()


@pytest.mark.program
def test_scores_alone_are_enough(open_page: Any) -> None:
    parts = ("rolled", "token", "attention", "fused", "total", "gap", "converged", "reference")
    relevance = make_relevance(boundaries=(), **dict.fromkeys(parts))
    page = open_page(relevance)
    is_shown(page(READ)["text"], relevance, relevance.scores, own_top(relevance, relevance.scores))
    assert page.page.locator("#by-layer").is_hidden() and page.page.locator("#layer-label").is_hidden()
    assert len(page(READ)["rows"][0]) == 3


@pytest.mark.program
def test_hostile_text_stays_text_in_a_browser(open_page: Any) -> None:
    page = open_page({HOSTILE[0]: make_relevance(HOSTILE, method="<img src=x onerror=alert(1)>")})
    assert page.page.locator("#text span").first.inner_text() == HOSTILE[0]
    assert page("document.querySelectorAll('#text img, body b, #text script').length") == page(
        "document.querySelectorAll('#help b, .names b').length"
    )
