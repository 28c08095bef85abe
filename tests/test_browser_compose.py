"""The explorer's numbers against `lig_lens.flow.compose` itself, on Flows of every kind that hypothesis draws.

How far both may be apart is worked out with them: rounding of float32, and of halves where the page holds those. So a
limit or a formula that differs on either side does not hide in a tolerance.
"""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from browser_pages import Page, chained
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_flows import EPS, cancelling_steps, specs

from lig_lens.flow import compose, routes
from lig_lens.show.explorer import contents, write_explorer
from lig_lens.show.plots.select import cancelling

pytestmark = [
    pytest.mark.program,
    pytest.mark.filterwarnings("ignore::lig_lens.CancellationWarning"),  # random Flows
]

K = 6  # paths
NUMBERS = """k => ligLens.samples.flatMap((sample) => sample.views).map((view) => {
    const layers = (read) => view.spec.layers.map((_, layer) => read(layer));
    const own = (map) => (map === "attn" ? view.heads(map) : [null]);
    const numbers = (map) => ({
        heads: layers((l) => view.heads(map).map((head) => Array.from(view.headsMatrix(map, l, head)))),
        matrix: layers((l) => Array.from(view.matrix(map, l))),
        past: layers((l) => view.past(map, l) && Array.from(view.past(map, l))),
        divisors: layers((l) => own(map).map((head) => Array.from(view.divisors(map, l, head)))),
        cancelling: layers((l) => own(map).map((head) => view.cancelling(map, l, head))),
    });
    const rows = [...view.spec.layers.keys(), view.nLayers];
    const positions = view.sample.tokens.map((_, i) => i);
    const followed = (map) => ({
        steps: layers((l) => view.heads(map).map((head) => Array.from(view.stepShares(map, l, head)))),
        past: layers((l) => Array.from(view.pastShares(map, l))),
        rollout: rows.map((row) => positions.map((i) => view.rollout(map, row, i).map((one) => Array.from(one)))),
        paths: rows.map((row) => positions.map((i) => view.paths(map, row, i, k))),
    });
    const all = (maps, read) => Object.fromEntries(maps.map((map) => [map, read(map)]));
    return {
        label: view.spec.label, by_head: view.spec.by_head, half: view.spec.half, maps: all(view.maps, numbers),
        followed: view.chained ? all(view.maps.filter((map) => view.composes(map)), followed) : null,
    };
})"""


@pytest.fixture(scope="module")
def numbers_of(browser, tmp_path_factory):
    """Numbers of Flows on a page, by label; all pages are opened in one window."""
    folder = tmp_path_factory.mktemp("pages")
    page = Page(browser, write_explorer(chained(), folder / "first.html"))
    names = itertools.count()

    def numbers(drawn, exact=contents.EXACT_NUMBERS, most=contents.MOST_NUMBERS):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(contents, "EXACT_NUMBERS", exact)
            patch.setattr(contents, "MOST_NUMBERS", most)
            path = write_explorer({str(i): flow for i, flow in enumerate(drawn)}, folder / f"{next(names)}.html")
        page.page.goto(path.as_uri())
        path.unlink()
        assert page.wrong == []
        return {int(view.pop("label")): SimpleNamespace(**view) for view in page(NUMBERS, K)}

    yield numbers
    page.page.close()


def tensor(values, *shape):
    return torch.tensor(values, dtype=torch.float64).reshape(shape)


def agree(found, expected, apart):
    """Whether numbers are at most `apart`, beside what float64 itself leaves open."""
    assert found.shape == expected.shape
    apart = 1.01 * apart.nan_to_num(nan=math.inf, posinf=math.inf) + 1e-12 * expected.abs() + 1e-30
    assert torch.isfinite(found).all() and ((found - expected).abs() <= apart).all(), (found, expected, apart)


def ratio(part, whole):
    return torch.where(part == 0, 0.0, part / whole.abs())


def packed(values, half):
    """How far numbers of a page may be from the Flow's: halves are of a layer's largest number."""
    if not half:
        return torch.zeros_like(values)
    largest = values.abs().flatten(1).amax(1).reshape(-1, *[1] * (values.ndim - 1))
    return values.abs() * (2**-11 + EPS) + 2**-24 * largest


class UnclearError(Exception):
    """Rounding alone decides whether a sum is rounding."""


def rounding(sums, sizes, n_terms):
    """Which sums are rounding, where `sizes` are those of the columns of each layer."""
    floor = n_terms * EPS * sizes.flatten(1).amax(1).reshape(-1, *[1] * (sums.ndim - 1))
    if ((sums.abs() - floor).abs() <= 0.15 * floor)[sums != 0].any():
        raise UnclearError
    return sums.abs() <= floor


class Sides:
    """What Python says of a Flow's compositions by a rule, and how far a page may be from it."""

    def __init__(self, flow, rule, half, by_head=True):
        self.flow, self.rule, self.by_head = flow, rule, by_head
        self.edges, self.shares = compose.edges(flow, rule), compose.shares(flow, rule)
        attn, heads = flow.attn.double(), self.edges.heads
        n_heads, n_pos = heads.shape[1:3]
        sums, sizes = attn.sum(-2, keepdim=True), attn.abs().sum(-2, keepdim=True)
        rests = rounding(sums, sizes, n_pos)
        rounded = 4 * EPS + torch.where(rests, 0.0, ratio(n_pos * EPS * sizes, sums))
        self.apart = heads.abs() * (rounded + ratio(packed(attn, half), attn))
        self.total = heads.sum((1, 2)) + self.edges.skip
        self.size = heads.abs().sum((1, 2)) + self.edges.skip.abs()
        self.rests = rounding(self.total, self.size, n_heads * n_pos)
        # Edges that are rounded one by one move their sum; halves do not, for the page has sums beside them.
        moved = 2 * EPS * self.size
        self.moved = torch.where(self.rests, 0.0, moved / (self.total.abs() - moved).clamp(min=0))
        self.composed = compose.compose(flow, rule).double()
        if by_head:
            self.composed_apart = self.apart.sum(1) + EPS * (heads.abs().sum(1) + self.composed.abs())
        else:
            self.composed_apart = packed(self.composed, half) + EPS * self.composed.abs()

    def over_total(self, apart, share):
        """How far shares may be apart whose edges are."""
        shape = (len(self.total), *[1] * (apart.ndim - 2), -1)
        total, moved, rests = (one.reshape(shape) for one in (self.total.abs(), self.moved, self.rests))
        return torch.where(rests, 0.0, (apart / total + share.abs() * (moved + EPS)) * (1 + moved))

    def steps(self):
        """Shares of whole steps, and how far they may be apart."""
        steps = self.shares.heads.sum(1) + torch.diag_embed(self.shares.skip)
        return steps, self.over_total(self.composed_apart, steps)


def sides_agree(flow, rule, found, half, by_head):
    sides = Sides(flow, rule, half, by_head)
    shape = flow.attn.shape
    n_layers, _, n_pos, n_dst = shape
    numbers = found.maps[rule]
    agree(tensor(numbers["matrix"], n_layers, n_pos, n_dst), sides.composed, sides.composed_apart)
    past = sides.edges.skip
    given = [layer or [0] * n_dst for layer in numbers["past"]]
    agree(tensor(given, n_layers, n_dst), past, EPS * past.abs())
    if by_head:
        agree(tensor(numbers["heads"], *shape), sides.edges.heads, sides.apart)
    whole = torch.where(sides.rests, 0.0, sides.total)
    agree(tensor(numbers["divisors"], n_layers, n_dst), whole, torch.where(sides.rests, 0.0, 4 * EPS * sides.size))
    times = sides.size / sides.total.abs()
    if not ((times / compose.CANCELS - 1).abs() < 1e-3).any():
        assert [count for (count,) in numbers["cancelling"]] == cancelling_steps(flow, rule)
    if found.followed is not None:
        follow(sides, found.followed[rule])


def follow(sides, found):
    """Shares of steps, rollout from and to every node, and paths."""
    flow, rule = sides.flow, sides.rule
    n_layers, _, n_pos, _ = flow.attn.shape
    steps, apart = sides.steps()
    past = sides.shares.skip
    past_apart = sides.over_total(EPS * sides.edges.skip.abs(), past)
    heads_apart = sides.over_total(sides.apart, sides.shares.heads)
    agree(tensor(found["past"], n_layers, n_pos), past, past_apart)
    if sides.by_head:
        agree(tensor(found["steps"], *flow.attn.shape), sides.shares.heads, heads_apart)
    first = flow.layers[0]
    for row, low in itertools.product({0, n_layers // 2, n_layers}, repeat=2):
        between = range(min(row, low), max(row, low))
        expected, most, least = (torch.eye(n_pos, dtype=torch.float64) for _ in range(3))
        if between:
            expected = compose.rollout(flow, first + between.start, first + between.stop, rule).double()
        for layer in between:
            most, least = most @ (steps[layer].abs() + apart[layer]), least @ steps[layer].abs()
        at = torch.stack([tensor(found["rollout"][row][i][low], n_pos) for i in range(n_pos)])
        agree(at.T if low <= row else at, expected, most - least + EPS * (expected.abs() + 1e-6 * most))
    if sides.by_head:
        for row, i in itertools.product({1, n_layers}, range(n_pos)):
            expected = routes.paths(flow, i, K, first, first + row, rule)
            paths_agree(sides, found["paths"][row][i], expected, heads_apart, past_apart)


def paths_agree(sides, found, expected, heads_apart, past_apart):
    """Each path's weight is the product of Python's shares, and none is weaker than its place among Python's allows."""

    def weighed(steps):
        weight, most = 1.0, 1.0
        for row, head, src, dst in steps:
            share, apart = (sides.shares.skip, past_apart) if head is None else (sides.shares.heads, heads_apart)
            where = (row, dst) if head is None else (row, head, src, dst)
            weight, most = weight * float(share[where]), most * (abs(float(share[where])) + float(apart[where]))
        return weight, 1.01 * (most - abs(weight)) + 1e-12 * abs(weight) + 1e-30

    for step in itertools.chain.from_iterable(path["steps"] for path in found):
        step["head"] = None if step["head"] < 0 else step["head"]
    by = ("layer", "head", "src", "dst")
    ours = [(path["weight"], *weighed([step[key] for key in by] for step in path["steps"])) for path in found]
    first = sides.flow.layers[0]
    theirs = [weighed((s.layer - first, s.head, s.src, s.dst) for s in path.steps) for path in expected]
    for weight, product, apart in ours:
        assert abs(weight - product) <= apart
    sizes = [abs(weight) for weight, *_ in ours]
    assert sizes == sorted(sizes, reverse=True) and len(ours) <= K
    size_of = dict(enumerate(sizes))
    for place, path in enumerate(expected):
        below = max(apart for _, apart in theirs[: place + 1])
        above = max((apart for *_, apart in ours[: place + 1]), default=0.0)
        assert abs(path.weight) - below <= size_of.get(place, 0.0) <= abs(path.weight) + above
    assert all(size <= apart for size, (*_, apart) in zip(sizes[len(expected) :], ours[len(expected) :], strict=True))


def shares_agree(flow, map, found, half):
    """Columns of a map itself divided by their sums, and how many nearly cancel."""
    terms, numbers = flow.columns(map).double(), found.maps[map]
    sums, sizes = terms.sum(-2), terms.abs().sum(-2)
    rests = rounding(sums, sizes, terms.shape[-2])
    divisors = tensor(numbers["divisors"], *sums.shape)
    shares = flow.shares(map).double()
    assert ((shares == 0).all(-2) == rests).all()
    agree(divisors, torch.where(rests, 0.0, sums), torch.where(rests, 0.0, terms.shape[-2] * EPS * sizes))
    if map != "mlp":
        heads = tensor(numbers["heads"], *terms.shape)
        agree(heads, terms, packed(terms, half))
        apart = packed(terms, half) / sums.abs().unsqueeze(-2)
        apart = apart + shares.abs() * (EPS + ratio(2 * terms.shape[-2] * EPS * sizes, sums)).unsqueeze(-2)
        divided = torch.where(divisors == 0, 0.0, 1 / divisors).unsqueeze(-2) * heads
        agree(divided, shares, torch.where(rests.unsqueeze(-2), 0.0, apart))
    if not ((sizes / sums.abs() / compose.CANCELS - 1).abs() < 5e-3).any():
        expected = cancelling(flow, map).reshape(len(sums), -1, sums.shape[-1])
        assert numbers["cancelling"] == expected.sum(-1).tolist()


def clear(drawn):
    """Flows of which neither side's rounding decides what rests."""
    kept = []
    for flow in (spec.flow() for spec in drawn):
        try:
            for rule in contents.RULES:
                Sides(flow, rule, half=False)
            for map in flow.maps:
                terms = flow.columns(map).double()
                rounding(terms.sum(-2), terms.abs().sum(-2), terms.shape[-2])
        except UnclearError:
            continue
        kept.append(flow)
    assume(kept)
    return kept


@settings(max_examples=6)
@given(drawn=st.lists(specs, min_size=4, max_size=6), half=st.booleans())
def test_numbers_are_those_of_compose(numbers_of, drawn, half):
    drawn = clear(drawn)
    found = numbers_of(drawn, exact=0 if half else contents.EXACT_NUMBERS)
    for number, flow in enumerate(drawn):
        assert found[number].half == half and found[number].by_head
        assert list(found[number].maps) == [*flow.maps, *contents.RULES]
        for rule in contents.RULES:
            sides_agree(flow, rule, found[number], half, by_head=True)
        for map in flow.maps:
            shares_agree(flow, map, found[number], half)


@settings(max_examples=3)
@given(spec=specs.filter(lambda spec: spec.n_heads > 2), half=st.booleans())
def test_numbers_without_single_heads_are_those_of_compose(numbers_of, spec, half):
    (flow,) = clear([spec])
    count = sum(part.numel() for part in (flow.attn, flow.mlp, flow.skip, flow.bias, flow.block))
    (found,) = numbers_of([flow], 0 if half else contents.EXACT_NUMBERS, count - 1).values()
    assert not found.by_head and "attn" not in found.maps
    for rule in contents.RULES:
        sides_agree(flow, rule, found, half, by_head=False)


@settings(max_examples=2)
@given(drawn=st.lists(specs, min_size=3, max_size=5), half=st.booleans())
def test_numbers_of_a_metric_are_the_flows(numbers_of, drawn, half):
    drawn = [spec.of_metric() for spec in drawn]
    found = numbers_of(drawn, exact=0 if half else contents.EXACT_NUMBERS)
    for number, flow in enumerate(drawn):
        shape, numbers = flow.attn.shape, found[number].maps["metric"]
        attn, skip = flow.attn.double(), flow.skip.double()
        apart = packed(attn, half)
        heads, matrix = tensor(numbers["heads"], *shape), tensor(numbers["matrix"], shape[0], *shape[2:])
        agree(heads, attn, apart)
        agree(tensor(numbers["past"], *skip.shape), skip, torch.zeros_like(skip))
        whole = attn.sum(1) + torch.diag_embed(skip)
        agree(matrix, whole, apart.sum(1) + 2 * EPS * (attn.abs().sum(1) + torch.diag_embed(skip.abs())))
        divisors = tensor(numbers["divisors"], shape[0], 1, 1, shape[-1])
        shares = torch.where(divisors == 0, 0.0, heads / torch.where(divisors == 0, 1.0, divisors))
        expected = flow.shares().double()
        agree(shares, expected, EPS * expected.abs() + torch.where(divisors == 0, 0.0, apart / divisors.abs()))
