"""The explorer in a real browser: its numbers are the tensors', its controls do what they say, text stays text."""

import collections
import json
import time

import pytest
import torch
from browser_pages import chained
from drawn import everything_is_told
from flows import HOSTILE, make_flow
from plot_cases import metric_flow

import lig_lens

pytestmark = [
    pytest.mark.program,
    pytest.mark.filterwarnings("ignore::lig_lens.CancellationWarning"),  # random Flows
]

# 12 layers, 12 heads, 128 tokens; tests allow ten times as much, since other work may slow them.
FIRST_PAINT_MS, CLICK_MS = 2000, 100


def close(found, expected):
    torch.testing.assert_close(found, expected.double().flatten(), rtol=2e-5, atol=1e-6 * float(expected.abs().max()))


# Numbers.


def test_matrices_are_the_tensors(open_page):
    flow = chained()
    page = open_page(flow)
    composed = {rule: flow.compose(rule) for rule in ("product", "conserving")}
    for layer in range(3):
        close(page.matrix("block", layer), flow.block[layer])
        for rule, expected in composed.items():
            close(page.matrix(rule, layer), expected[layer])
        for head in range(3):
            close(page.matrix("attn", layer, head), flow.attn[layer, head])
            shares = lig_lens.flow.compose.edges(flow, "conserving").heads[layer, head]
            close(page.matrix("conserving", layer, head), shares)


def test_a_clicked_tokens_numbers_are_the_tensors(open_page):
    flow = chained()
    page = open_page(flow)
    page.set(map="attn")
    page.click_node(2, 4)
    rows = page("ligLens.rows")
    assert len(rows) == 3 * 7 * 2  # into it through layer 1, out of it through layer 2
    for row in rows:
        assert row["value"] == pytest.approx(
            float(flow.attn[row["layer"], row["head"], row["src"], row["dst"]]), rel=1e-6
        )
        share = float(flow.shares()[row["layer"], row["head"], row["src"], row["dst"]])
        assert row["share"] == pytest.approx(share, rel=1e-4)
        assert row["gap"] == pytest.approx(float(flow.gap["attn"][row["layer"], row["head"], row["dst"]]), rel=1e-6)
    into, out_of = ({(r["layer"], r["src"], r["dst"]) for r in rows if r[end] == 4} for end in ("dst", "src"))
    assert {(1, src, 4) for src in range(7)} <= into and {(2, 4, dst) for dst in range(7)} <= out_of
    first = page.page.locator("#table tbody tr").first.locator("td").all_inner_texts()
    best = max(rows, key=lambda row: abs(row["value"]))
    assert float(first[4].replace("−", "-")) == pytest.approx(best["value"], rel=1e-4)
    assert first[0] == str(best["layer"]) and first[1] == str(best["head"])


@pytest.mark.parametrize("rule", ["product", "conserving"])
def test_flow_through_all_layers_is_the_rollout(open_page, rule: str):
    flow = chained()
    page = open_page(flow)
    page.set(map=rule)
    page.click_node(3, 5)
    for start in range(3):
        found = torch.tensor(page(f"Array.from(ligLens.scene.cone[{start}])"), dtype=torch.float64)
        expected = flow.rollout(start=start, rule=rule)[:, 5]
        torch.testing.assert_close(found, expected.double(), rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    page.click_node(0, 2)
    found = torch.tensor(page("Array.from(ligLens.scene.cone[3])"), dtype=torch.float64)
    expected = flow.rollout(rule=rule)[2]
    torch.testing.assert_close(found, expected.double(), rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("rule", ["product", "conserving"])
def test_paths_are_the_strongest(open_page, rule: str):
    flow = chained(seed=1)
    page = open_page(flow)
    page.set(map=rule, k=12)
    page.click_node(3, 6)
    found = page("ligLens.scene.paths")
    expected = flow.paths(6, k=12, rule=rule)
    assert len(found) == len(expected) == 12
    for path, other in zip(found, expected, strict=True):
        assert path["weight"] == pytest.approx(other.weight, rel=1e-3)
        heads = [None if step["head"] == -1 else step["head"] for step in path["steps"]]
        assert [(s["layer"], h, s["src"], s["dst"]) for s, h in zip(path["steps"], heads, strict=True)] == [
            (step.layer, step.head, step.src, step.dst) for step in other.steps
        ]
    assert page.page.locator("#path-list li").count() == 12
    # Drawn once each, with the weights of all paths that take them.
    weights = collections.defaultdict(float)
    for path in expected:
        for step in path.steps:
            weights[step.layer, -1 if step.head is None else step.head, step.src, step.dst] += path.weight
    steps = page("ligLens.scene.steps")
    assert {(s["layer"], s["head"], s["src"], s["dst"]) for s in steps} == set(weights)
    for step in steps:
        weight = weights[step["layer"], step["head"], step["src"], step["dst"]]
        assert step["weight"] == pytest.approx(weight, rel=1e-3, abs=1e-6)
    drawn = page.page.locator("#graph path[data-path]")
    assert drawn.count() == len(weights)
    for number, step in enumerate(steps):
        assert (drawn.nth(number).get_attribute("stroke-dasharray") is not None) == (step["weight"] < 0)
    page.page.hover("#path-list li:nth-child(2)")
    shown = page("[...document.querySelectorAll('#graph [data-path]')].filter(e => !e.style.strokeOpacity).length")
    assert shown == len(expected[1].steps)


def test_contributions_to_a_metric(open_page):
    model, pair = lig_lens.load_model("induction"), lig_lens.induction_pairs(1)[0]
    target = lig_lens.logit_difference(pair.answer, pair.wrong)
    flow = lig_lens.attribute(model, pair.clean, corrupted=pair.corrupted, target=target, progress=False)
    page = open_page(flow)
    assert page.state("map") == "metric"
    expected = flow.attn.sum(1) + torch.diag_embed(flow.skip)
    for layer in range(2):
        close(page.matrix("metric", layer), expected[layer])
    page.set(scale="absolute")
    leaving = torch.tensor(page("Array.from(ligLens.scene.nodes[0])"))
    torch.testing.assert_close(leaving, (flow.attn.sum((1, 3)) + flow.skip)[0], rtol=1e-4, atol=1e-5)
    # One colour scale for all blocks, as they have one unit; or one for each.
    largest = [float(flow.attn[layer].sum(0).abs().max()) for layer in range(2)]
    assert page("ligLens.large.top") == pytest.approx(max(largest), rel=1e-5)
    page.page.uncheck("#shared")
    assert page("ligLens.large.top") < max(largest) or largest[0] == max(largest)
    gaps = {row["gap"] for row in page("ligLens.rows")}
    assert len(gaps) == 1 and gaps.pop() == pytest.approx(float(flow.gap["attn"][0]))


# Controls.


def test_every_control_changes_what_it_says(open_page):
    page = open_page({"first": chained(), "second": chained(seed=5), "other": make_flow(tokens=("x", "y", "z"))})
    graph, ui = "document.querySelector('#graph').innerHTML", page.page
    before = page(graph)

    def changed() -> bool:
        nonlocal before
        before, was = page(graph), before
        return before != was

    ui.select_option("#view", "1")
    assert page.state("view") == 1 and changed() and page("ligLens.view.spec.label") == "second"
    ui.select_option("#map", "block")
    assert page.state("map") == "block" and changed()
    ui.check("input[name=scale][value=absolute]")
    assert page.state("scale") == "absolute" and changed() and "units of" in ui.inner_text("#note")
    edges = page("ligLens.scene.edges.length")
    ui.locator("#threshold").fill("95")
    assert page("ligLens.scene.edges.length") < edges and changed()
    for value in ("linear", "pivot", "sqrt"):
        ui.select_option("#circle", value)
        assert page.state("circle") == value and changed()
    width = page("document.querySelector('#graph svg').viewBox.baseVal.width")
    ui.locator("#spacing").fill("2")
    assert page("document.querySelector('#graph svg').viewBox.baseVal.width") > width and changed()
    ui.select_option("#orient", "right")
    assert changed() and page("ligLens.placeOf(2, 0).x > ligLens.placeOf(0, 0).x")
    assert page("ligLens.placeOf(0, 1).y > ligLens.placeOf(0, 0).y")
    ui.check("#special")
    assert page("ligLens.scene.positions") == [1, 2, 3, 4, 5] and changed()
    ui.check("#punct")
    assert page.state("punct") and page("ligLens.scene.positions") == [1, 2, 3, 4, 5]  # '##s' has a letter
    ui.select_option("#map", "conserving")
    page.click_node(3, 2)
    assert page("ligLens.scene.paths.length") == 8
    ui.uncheck("#paths")
    assert page("ligLens.scene.paths.length") == 0 and not ui.locator("#path-list li").count()
    ui.check("#paths")
    ui.locator("#k").fill("3")
    ui.locator("#k").press("Enter")
    assert page("ligLens.scene.paths.length") == 3
    ui.locator("#threshold").fill("1")
    skips = "ligLens.scene.edges.filter(e => e.kind === 'skip').length"
    assert page(skips) > 0
    ui.uncheck("#skip")
    assert page(skips) == 0
    ui.click("#heads button:nth-child(2)")
    assert page.state("head") == 1 and ui.inner_text("#heads-title") == "Block 2, head 1"
    ui.click("#theme")
    dark = page("document.documentElement.dataset.theme")
    ui.click("#theme")
    assert {dark, page("document.documentElement.dataset.theme")} == {"dark", "light"}
    ui.click("#help-button")
    assert ui.is_visible("#help")
    ui.select_option("#sample", "1")
    assert page("ligLens.view.nTokens") == 3 and page.state("node") is None
    ui.click("#reset")
    assert page.state("sample") == 0 and page.state("map") == "conserving" and not page.state("special")


def test_the_keyboard_reaches_everything(open_page):
    page = open_page(chained())
    keys = page.page.keyboard
    page.page.focus("#graph")
    keys.press("ArrowUp")
    assert page.state("layer") == 1 and page.state("node") is None
    keys.press("ArrowRight")
    assert page.state("node") == {"row": 2, "pos": 0}
    keys.press("ArrowRight")
    keys.press("ArrowUp")
    assert page.state("node") == {"row": 3, "pos": 1} and page.state("layer") == 2
    assert "‘the’ (1) leaving block 2" in page.page.inner_text("#status")
    keys.press("]")
    keys.press("]")
    assert page.state("head") == 1
    keys.press("[")
    assert page.state("head") == 0
    keys.press("p")
    keys.press("s")
    assert not page.state("paths") and not page.state("skip")
    keys.press("Escape")
    assert page.state("node") is None and page.state("head") is None
    # Every control can be reached with the tab key, and has a name.
    assert (
        page("""() => [...document.querySelectorAll('button, select, input')]
        .filter(e => !(e.textContent.trim() || e.ariaLabel || e.labels?.length)).length""")
        == 0
    )


def test_what_the_keyboard_chooses_is_in_sight(open_page):
    page = open_page(chained(n_layers=40, maps=("attn", "mlp")))
    page.page.focus("#graph")
    inside = """([row, pos]) => { const box = document.querySelector('#graph').getBoundingClientRect();
        const at = ligLens.placeOf(row, pos); return at.y > box.top && at.y < box.bottom; }"""
    assert page(inside, [40, 0]) and not page(inside, [1, 0])
    page.page.keyboard.press("ArrowRight")
    assert page.state("node") == {"row": 1, "pos": 0} and page(inside, [1, 0])
    for _ in range(39):
        page.page.keyboard.press("ArrowUp")
    assert page.state("node") == {"row": 40, "pos": 0} and page(inside, [40, 0])


def test_the_mouse_chooses_tokens_and_layers(open_page):
    page = open_page(chained())
    place = page("ligLens.placeOf(2, 3)")
    page.page.mouse.click(place["x"], place["y"])
    assert page.state("node") == {"row": 2, "pos": 3} and page.state("layer") == 1
    page.page.mouse.click(place["x"], place["y"])
    assert page.state("node") is None  # a second click lets it go
    page.page.locator("#graph text[data-token='5']").click()
    assert page.state("node") == {"row": 3, "pos": 5}  # what becomes of it
    page.page.locator("#graph text[data-layer='1']").click()
    assert page.state("layer") == 1
    page.set(map="block")
    page.page.locator("#graph text[data-token='4']").click()
    assert page.state("node") == {"row": 2, "pos": 4}  # of one block, where flow cannot be followed


def test_a_head_alone_is_one_of_its_block(open_page):
    flow = chained()
    page = open_page(flow)
    page.set(map="attn", layer=1, head=2, threshold=0)
    heads = {(edge["layer"], edge["head"], edge["quiet"]) for edge in page("ligLens.scene.edges")}
    assert heads == {(0, None, True), (1, 2, False), (2, None, True)}
    assert {row["head"] for row in page("ligLens.rows")} == {2}
    for edge in page("ligLens.scene.edges.filter(edge => edge.layer === 1)"):
        share = float(flow.shares()[1, 2, edge["src"], edge["dst"]])
        assert edge["value"] == pytest.approx(share, rel=1e-4)
    everything_is_told(page, flow)
    page.set(layer=2)
    assert page.state("head") is None  # another block's head 2 is another head


def test_flow_that_forgets_what_tokens_keep(open_page):
    flow = chained()
    page = open_page(flow)
    assert page.state("map") == "conserving" and "keeps" not in page.page.inner_text("#warning")
    flow.skip.zero_()
    flow.bias.zero_()
    page = open_page(flow)
    assert page.state("map") == "attn" and "keeps" not in page.page.inner_text("#warning")
    page.set(map="conserving")
    assert "What a token keeps of itself is not part" in page.page.inner_text("#warning")
    assert page("document.querySelector('#skip').disabled")


def test_names_stay_in_sight(open_page):
    page = open_page(chained(n_layers=40, maps=("attn", "mlp")))
    inside = """name => { const box = document.querySelector('#graph').getBoundingClientRect();
        return [...document.querySelectorAll(`#graph text[${name}]`)].every(text => {
            const at = text.getBoundingClientRect();
            return at.left >= box.left && at.right <= box.right && at.bottom <= box.bottom + 1; }); }"""
    assert page("document.querySelector('#graph').scrollHeight > document.querySelector('#graph').clientHeight")
    for scroll in (0, 300, 9999):
        page("top => document.querySelector('#graph').scrollTo(0, top)", scroll)
        page.page.wait_for_timeout(100)
        assert page(inside, "data-token")
    page.set(orient="right", spacing=3)
    sides = """name => { const box = document.querySelector('#graph').getBoundingClientRect();
        const all = [...document.querySelectorAll(`#graph text[${name}]`)].map(text => text.getBoundingClientRect());
        return name === 'data-token' ? all.every(at => at.left >= box.left && at.right <= box.right)
            : all.every(at => at.bottom <= box.bottom + 1 && at.top > box.top); }"""
    for scroll in (0, 500, 9999):
        page("left => document.querySelector('#graph').scrollTo(left, left)", scroll)
        page.page.wait_for_timeout(100)
        assert page(sides, "data-token") and page(sides, "data-layer")


def test_pointer_tells_exact_numbers(open_page):
    flow = chained()
    page = open_page(flow)
    page.set(map="block", scale="absolute", threshold=0)
    box = page.page.locator("#large").bounding_box()
    place = page("() => ({x: 0, ...ligLens.large.box, w: ligLens.large.cellWidth, h: ligLens.large.cellHeight})")
    page.page.mouse.move(box["x"] + place["x"] + 2.5 * place["w"], box["y"] + place["y"] + 4.5 * place["h"])
    text = page.page.inner_text("#tip")
    value = float(text.split("value ")[1].split(",")[0].replace("−", "-"))
    assert "‘cat’ (2) → ‘the’ (4)" in text and value == pytest.approx(float(flow.block[0, 2, 4]), rel=1e-4)
    gap = float(text.split("column ")[1].split(",")[0])
    assert gap == pytest.approx(float(flow.gap["block"][0, 4]), rel=0.06)
    page.page.locator("#graph path[data-edge]").first.dispatch_event("pointermove", {"bubbles": True})
    assert "value" in page.page.inner_text("#tip")


def test_the_link_holds_the_state(open_page):
    page = open_page(chained())
    page.set(
        map="product", node={"row": 2, "pos": 3}, head=1, scale="absolute", special=True, threshold=0.3, paths=False
    )
    page.page.wait_for_timeout(400)
    link = page("location.hash")
    other = open_page(chained(), link)
    for key in ("map", "node", "head", "scale", "special", "threshold", "paths", "layer"):
        assert other.state(key) == page.state(key)
    broken = open_page(chained(), "#map=none&layer=99&node=77,1&head=-3&scale=x&threshold=abc")
    assert broken.state("map") == "conserving" and broken.state("layer") == 0 and broken.state("node") is None


# What is odd.


def test_a_destination_that_rests(open_page):
    flow = chained()
    flow.attn[:, :, :, 0] = 0  # as the first token of a causal model from itb
    page = open_page(flow)
    for rule in ("product", "conserving"):
        page.set(map=rule, threshold=0)
        page.click_node(3, 0)
        found = torch.tensor(page("Array.from(ligLens.scene.cone[0])"), dtype=torch.float64)
        expected = flow.rollout(rule=rule)[:, 0]
        torch.testing.assert_close(found, expected.double(), rtol=1e-3, atol=1e-4)
        everything_is_told(page, flow)
        page.set(node=None)


def test_strong_skips_leave_the_heads_their_digits(open_page):
    flow = chained()
    flow.skip.mul_(1e4)
    page = open_page(flow)
    for layer in range(3):
        values = page("l => Array.from(ligLens.view.headsMatrix('conserving', l))", layer)
        expected = lig_lens.flow.compose.edges(flow, "conserving").heads[layer].sum(0)
        close(torch.tensor(values, dtype=torch.float64), expected)


def test_columns_that_cancel_rest_in_halves_too(open_page, monkeypatch):
    monkeypatch.setattr("lig_lens.show.explorer.contents.EXACT_NUMBERS", 10)
    flow = chained()
    flow.attn[0, 1, :, 2] = torch.tensor([0.1, 0.23, -0.33, 0.0, 0.0, 0.0, 0.0])
    page = open_page(flow)
    expected = lig_lens.flow.compose.edges(flow, "conserving").heads[0, 1]
    found = page.matrix("conserving", 0, 1)
    torch.testing.assert_close(found, expected.flatten(), rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


def test_steps_that_nearly_cancel_are_told(open_page):
    flow = chained()
    for tensor in (flow.attn, flow.mlp, flow.skip):
        tensor.abs_()
    flow.bias.zero_()
    page = open_page(flow)
    page.click_node(3, 5)
    assert "cancel" not in page.page.inner_text("#warning")
    for row in (0, 2):
        flow.skip[row, 4] = -0.9 * float(lig_lens.flow.compose.edges(flow, "conserving").heads[row, :, :, 4].sum())
    page = open_page(flow)
    page.click_node(3, 5)
    assert "2 steps nearly cancel" in page.page.inner_text("#warning")


def test_a_hidden_token_is_no_choice(open_page):
    page = open_page(chained())
    page.click_node(3, 0)
    page.set(special=True)
    assert page.state("node") is None and "2 tokens hidden" in page.page.inner_text("#status")


def test_a_hidden_token_sets_no_scale(open_page):
    flow = chained()
    flow.block[:, 0, :] = 1e3  # of [CLS]
    page = open_page(flow)
    page.set(map="block", scale="absolute", special=True)
    shown = flow.block[0][1:6][:, 1:6].abs()
    assert page("ligLens.large.top") == pytest.approx(float(shown.max()), rel=1e-5)
    drawn = [edge for edge in page("ligLens.scene.edges") if edge["layer"] == 0]
    assert len(drawn) == int((shown >= page.state("threshold") * shown.max()).sum()) > 0


def test_sorting_keeps_the_focus(open_page):
    page = open_page(chained())
    page.page.focus("#table th button[data-key=src]")
    page.page.keyboard.press("Enter")
    assert page.state("sort") == "src" and page("document.activeElement.dataset.key") == "src"
    page.page.keyboard.press("ArrowRight")
    assert page.state("node") is None  # the keys of the picture are the picture's


def test_hostile_text_stays_text(open_page):
    flow = make_flow(tokens=HOSTILE, layers=(0, 1))
    object.__setattr__(flow, "model_name", HOSTILE[0])
    page = open_page({HOSTILE[1]: flow, HOSTILE[0]: make_flow(tokens=HOSTILE, layers=(0, 1), seed=1)})
    page.click_node(2, 0)
    page.set(map="attn")
    place = page("ligLens.placeOf(2, 1)")
    page.page.mouse.move(place["x"], place["y"])
    assert "onerror" in page.page.inner_text("#tip")
    assert page("window.hacked") is None and page.page.locator("img, #graph script").count() == 0
    shown = page.page.locator("#graph text[data-token='0']").text_content()
    assert "</script><script>window" in shown or shown.endswith("…")
    assert "onerror" in page.page.locator("#view option").first.text_content()


def test_missing_layers_and_destinations(open_page):
    flow = make_flow(layers=(0, 3, 4), destinations=(2, 5))
    page = open_page(flow)
    assert page("ligLens.scene.rows.low") == [0, 2, 3] and page("ligLens.scene.rows.high") == [1, 3, 4]
    page.click_node(3, 5)
    assert "every layer in between and all destinations" in page.page.inner_text("#path-list")
    for name in ("attn", "mlp", "block", "product", "conserving"):
        page.set(map=name)
        everything_is_told(page, flow)
    assert page("ligLens.scene.cone") is None


def test_no_single_heads(open_page, monkeypatch):
    flow = chained()
    monkeypatch.setattr("lig_lens.show.explorer.contents.MOST_NUMBERS", 600)
    page = open_page(flow)
    assert page("ligLens.view.maps") == ["mlp", "block", "product", "conserving"]
    assert "Single heads are left out" in page.page.inner_text("#note")
    page.click_node(3, 1)
    found = torch.tensor(page("Array.from(ligLens.scene.cone[0])"), dtype=torch.float64)
    torch.testing.assert_close(found, flow.rollout()[:, 1].double(), rtol=1e-3, atol=1e-3)
    # Of Flows with the attn map alone, and of a metric, heads are added up as well.
    monkeypatch.setattr("lig_lens.show.explorer.contents.MOST_NUMBERS", 250)
    for flow in (make_flow(maps=("attn",)), metric_flow(("a", "b", "c", "d", "e", "f", "g"))):
        page = open_page(flow)
        name = page.state("map")
        expected = flow.attn.sum(1) + (0 if flow.metric is None else torch.diag_embed(flow.skip))
        assert page("ligLens.view.maps") == [name] and name == ("attn" if flow.metric is None else "metric")
        for layer in range(2):
            close(page.matrix(name, layer), expected[layer])
        assert {row["head"] for row in page("ligLens.rows")} <= {"all", "past"}
        page.set(threshold=0)
        everything_is_told(page, flow)


def test_speed_at_12_layers_12_heads_128_tokens(open_page, capsys):
    flow = make_flow(tokens=[f" w{i}" for i in range(128)], layers=tuple(range(12)), n_heads=12)
    for tensor in (flow.attn, flow.mlp, flow.block, flow.skip, flow.bias):
        tensor.abs_().pow_(4)  # positive and uneven, as contributions are
    begun = time.perf_counter()
    page = open_page(flow)
    opened = 1000 * (time.perf_counter() - begun)
    paint = page("performance.getEntriesByName('lig_lens first paint')[0].startTime")
    page("""() => { window.times = []; document.addEventListener('click', () => {
        const begun = performance.now();
        requestAnimationFrame(() => { const c = new MessageChannel();
            c.port1.onmessage = () => times.push(performance.now() - begun); c.port2.postMessage(0); });
    }, true); }""")
    page.page.wait_for_timeout(1000)
    for row, pos in ((12, 100), (12, 20), (6, 64), (6, 65), (3, 127), (0, 5)):
        page.click_node(row, pos)
        page.page.wait_for_timeout(300)
    times = sorted(page("times"))
    size = len(page("document.documentElement.outerHTML")) / 1e6
    with capsys.disabled():
        print(
            f"\nexplorer, 12 x 12 x 128: first paint {paint:.0f} ms (opened in {opened:.0f} ms), clicks "
            f"{json.dumps([round(t) for t in times])} ms, page {size:.1f} MB"
        )
    assert paint < 10 * FIRST_PAINT_MS and times[len(times) // 2] < 10 * CLICK_MS
