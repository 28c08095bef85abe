"""The explorer's page as a file: what it holds and leaves out, and that text stays text. Its life: test_browser."""

import base64
import html
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from flows import HOSTILE, make_flow
from plot_cases import metric_flow

import lig_lens
from lig_lens.cli.main import run
from lig_lens.flow.compose import CANCELS
from lig_lens.show.explorer import contents, explore, write_explorer
from lig_lens.show.explorer.labelled import labelled

RULES = ("product", "conserving")


def header_of(page: str) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="header">(.*?)</script>', page, flags=re.DOTALL)
    return json.loads(text)


def decoded(page: str, spec: dict) -> np.ndarray:
    (text,) = re.findall(rf'<script type="text/plain" id="{spec["id"]}">(.*?)</script>', page)
    values = np.frombuffer(base64.b64decode(text), dtype=f"<{spec['dtype']}").astype(np.float32)
    return values.reshape(len(spec["scales"]), -1) * np.array(spec["scales"], dtype=np.float32)[:, None]


def test_small_flows_are_written_exactly():
    flow = make_flow()
    page = explore(flow).html
    (sample,) = header_of(page)["samples"]
    (view,) = sample["views"]
    assert not view["half"] and view["layers"] == [0, 3] and view["dropped"] is None
    for name in ("attn", "mlp", "skip", "bias", "block"):
        assert np.array_equal(decoded(page, view["arrays"][name]).ravel(), getattr(flow, name).numpy().ravel())
    assert np.array_equal(decoded(page, view["arrays"]["attn-gap"]).ravel(), flow.gap["attn"].numpy().ravel())


def test_large_flows_are_written_in_halves_of_each_layer(monkeypatch):
    monkeypatch.setattr(contents, "EXACT_NUMBERS", 10)
    flow = make_flow()
    flow.attn[1] *= 1e6  # which a half does not hold
    flow.attn[0] *= 1e-6
    page = explore(flow).html
    view = header_of(page)["samples"][0]["views"][0]
    assert view["half"]
    found, expected = decoded(page, view["arrays"]["attn"]), flow.attn.flatten(1).numpy()
    assert (np.abs(found - expected).max(1) <= np.abs(expected).max(1) * 2**-11).all()


def test_too_many_numbers_leave_single_heads_out_and_say_so(monkeypatch):
    flow = make_flow()
    count = sum(t.numel() for t in (flow.attn, flow.mlp, flow.skip, flow.bias, flow.block))
    monkeypatch.setattr(contents, "MOST_NUMBERS", count - 1)
    page = explore(flow).html
    view = header_of(page)["samples"][0]["views"][0]
    assert "attn" not in view["arrays"] and "Single heads are left out" in view["dropped"]
    for rule in ("product", "conserving"):
        assert np.array_equal(decoded(page, view["arrays"][rule]).ravel(), flow.compose(rule).numpy().ravel())
    with monkeypatch.context() as half:
        half.setattr(contents, "EXACT_NUMBERS", 10)
        arrays = header_of(explore(flow).html)["samples"][0]["views"][0]["arrays"]
        assert {name for name, spec in arrays.items() if spec["dtype"] == "f2"} == {"block", "product", "conserving"}
    monkeypatch.setattr(contents, "MOST_NUMBERS", 100)
    with pytest.raises(lig_lens.InputError, match=r"without single heads, and a page holds 100: choose fewer"):
        explore(flow)


def test_what_decides_numbers_is_said_in_python():
    flow = make_flow()
    page = explore(flow).html
    header = header_of(page)
    assert header["cancels"] == CANCELS and tuple(rule["name"] for rule in header["rules"]) == RULES
    assert set(header["samples"][0]["views"][0]["rounding"]) == {*flow.maps, *RULES}
    script = page.rsplit("<script>", 1)[1]
    assert not re.search("|".join(f"[\"'`]{rule}[\"'`]" for rule in RULES), script) and "CANCELS" not in script


def test_flows_of_one_prompt_stand_together():
    other = make_flow(tokens=("a", "b", "c"))
    (first, second) = header_of(explore([make_flow(seed=1), make_flow(seed=2), other]).html)["samples"]
    assert [len(first["views"]), len(second["views"])] == [2, 1]
    labels = [view["label"] for view in first["views"]]
    assert labels == ["attn itb, mlp zero, block itb", "attn itb, mlp zero, block itb (2)"]
    named = header_of(explore({"one": make_flow(seed=1), "two": make_flow(seed=2)}).html)["samples"]
    assert [view["label"] for view in named[0]["views"]] == ["one", "two"]


def test_hostile_text_stays_text():
    flow = make_flow(tokens=HOSTILE)
    object.__setattr__(flow, "model_name", HOSTILE[0])
    page = explore({HOSTILE[1]: flow}).html
    assert page.count("<script") == len(re.findall(r"<script(>| type=\")", page)) and "<img" not in page
    assert "window.hacked=1</script>" not in page and "\\u003c/script\\u003e" in page
    sample = header_of(page)["samples"][0]
    assert tuple(token["text"] for token in sample["tokens"]) == HOSTILE
    assert sample["views"][0]["label"] == HOSTILE[1] and sample["views"][0]["model"] == HOSTILE[0]


def test_page_asks_nobody_for_anything():
    page = explore(make_flow()).html
    assert "default-src 'none'" in page
    addresses = set(re.findall(r"https?://[^\"'\s]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"<(link|img|iframe)\b", page) and "@import" not in page and "fetch(" not in page


def test_tokens_are_told_apart():
    (sample,) = header_of(explore(make_flow(tokens=("[CLS]", " cat", "...", "'s"))).html)["samples"]
    assert [token["special"] for token in sample["tokens"]] == [True, False, False, False]
    assert [token["punctuation"] for token in sample["tokens"]] == [False, False, True, False]
    assert [token["shown"] for token in sample["tokens"]] == ["[CLS]", "·cat", "...", "'s"]


def test_what_differs_between_prompts_is_no_punctuation():
    flows = [make_flow(tokens=("the", word, "sat", ".", "😀")) for word in ("cat", "dog")]
    page = explore(lig_lens.average(flows).mean).html
    (sample,) = header_of(page)["samples"]
    assert [token["text"] for token in sample["tokens"]] == ["the", "*", "sat", ".", "😀"]
    assert [token["punctuation"] for token in sample["tokens"]] == [False, False, False, True, False]
    assert "mean of 2 prompts" in sample["views"][0]["facts"]


def test_half_a_surrogate_pair_is_a_token_too(tmp_path):
    write_explorer(make_flow(tokens=("a", "\ud83d", "b")), tmp_path / "a.html")
    assert header_of((tmp_path / "a.html").read_text(encoding="utf-8"))["samples"][0]["tokens"][1]["text"] == "?"


def test_in_a_notebook_and_as_a_file(tmp_path):
    page = make_flow().explore(height=500)
    frame = page._repr_html_()
    (inner,) = re.findall(r'srcdoc="([^"]*)"', frame)
    assert html.unescape(inner) == page.html and "height: 500px" in frame
    assert page.save(tmp_path / "a.html").read_text(encoding="utf-8") == page.html
    assert write_explorer(make_flow(), tmp_path / "b.html").read_text(encoding="utf-8") == page.html
    assert "MB" in repr(page)


@pytest.mark.parametrize(
    "flows, message",
    [
        ([], "no Flow: give at least one"),
        ({}, "no Flow"),
        ([1], "got int: give a Flow"),
        ({"a": 1}, "got int"),
        (None, "got NoneType"),
        ("flow.safetensors", "got str"),
        (lig_lens.average([make_flow(), make_flow(seed=1)]), r"got AverageFlow: .*of an average its \.mean"),
    ],
)
def test_bad_input(flows, message: str):
    with pytest.raises(lig_lens.InputError, match=message):
        labelled(flows)


def test_view_from_the_command_line(tmp_path, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
    first = make_flow().save(tmp_path / "first.safetensors")
    second = make_flow(seed=3).save(tmp_path / "second.safetensors")
    assert run(["view", str(first), str(second)]) == 0
    page = tmp_path / "first.html"
    assert opened == [page.as_uri()] and str(page) in capsys.readouterr().out
    assert len(header_of(page.read_text(encoding="utf-8"))["samples"][0]["views"]) == 2
    assert run(["view", str(first), "--html", str(tmp_path / "x.html"), "--no-open"]) == 0
    assert len(opened) == 1 and (tmp_path / "x.html").exists()
    for path in (str(tmp_path / "none.safetensors"), ".", "", str(tmp_path)):
        assert run(["view", path, "--no-open"]) == 2
        assert f"{path!r} is no file: give one that explain --out wrote" in capsys.readouterr().err


def test_a_metric_has_the_total_of_every_layer():
    model, pair = lig_lens.load_model("induction"), lig_lens.induction_pairs(1)[0]
    target = lig_lens.logit_difference(pair.answer, pair.wrong)
    flow = lig_lens.attribute(model, pair.clean, corrupted=pair.corrupted, target=target, progress=False)
    view = header_of(explore(flow).html)["samples"][0]["views"][0]
    assert view["totals"] == pytest.approx(flow.total["attn"].tolist()) and set(view["arrays"]) >= {"attn", "skip"}
    assert "logit_difference" in view["unit"] and "split" in view and "by message" not in view["label"]
    object.__setattr__(flow, "total", {"attn": torch.tensor([1.0, torch.nan])})
    assert header_of(explore(flow).html)["samples"][0]["views"][0]["totals"] == [1.0, None]
    by_message = replace(flow, settings=flow.settings | {"split": "message"})
    assert "by message" in header_of(explore(by_message).html)["samples"][0]["views"][0]["label"]
    with pytest.raises(lig_lens.InputError, match=r"differ in their split"):
        lig_lens.average([flow, by_message])
    effects = lig_lens.patching.patch(model, pair.clean, pair.corrupted, target, at="resid_pre", progress=False)
    with pytest.raises(lig_lens.InputError, match="use split='source' to compare positions"):
        lig_lens.compare(by_message, effects)


def test_a_metric_without_a_corrupted_run():
    flow = metric_flow(("a", "b"), metric="m")
    ends = header_of(explore(flow).html)["samples"][0]["views"][0]["facts"]
    assert "metric m (\u22121.5 \u2192 +3)" in ends
    settings = flow.settings | {"metric": {"clean": 3.0, "corrupted": None}}
    facts = header_of(explore(replace(flow, settings=settings)).html)["samples"][0]["views"][0]["facts"]
    assert "metric m \u00b7" in facts
