"""Flows from what hypothesis draws, in which sums cancel, rest or are rounding, on either side of each limit."""

import warnings
from dataclasses import dataclass

import torch
from flows import make_flow
from hypothesis import strategies as st
from plot_cases import metric_flow

import lig_lens
from lig_lens.flow import compose

EPS = torch.finfo(torch.float32).eps
NEAR = (0.95 * compose.CANCELS, 1.05 * compose.CANCELS)  # how many times a sum its terms are
# Of single columns, and of all that enters a destination; numbers are what is left of a floor of rounding, that of
# composed steps or of the mlp map.
COLUMNS = ("plain", "plain", "zero", "nothing", "cancels", "nearly", "far", 0.7, 1.4)
STEPS = ("plain", "plain", "rest", "held", "cancels", "nearly", 0.6, 1.5, ("mlp", 0.7), ("mlp", 1.4))


def taking_back(others, times):
    """What, added to terms, makes them `times` as large as their sum, or makes that 0 (None)."""
    total, size = float(others.sum()), float(others.abs().sum())
    return -total if times is None else -total + (1 if total >= 0 else -1) * (size + abs(total)) / (times + 1)


def times_of(kind):
    return {"nothing": None, "cancels": NEAR[1], "nearly": NEAR[0], "far": 300.0}[kind]


def left_of_floor(strongest, part, n_terms):
    """Two terms that leave a part of what is rounding beside the strongest column; their sum is exact."""
    return strongest / 4, -(strongest / 4 - part * EPS * n_terms * strongest)


@dataclass(frozen=True)
class Spec:
    """What a Flow is made from: made in the test, for the checks of types draw lots, which strategies may not."""

    n_pos: int
    n_heads: int
    n_layers: int
    order: tuple[int, ...]
    n_dst: int | None
    causal: bool
    odd: bool
    seed: int

    def flow(self):
        positions, layers = tuple(range(self.n_pos)), range(self.n_layers)
        if self.n_dst is not None:  # then no paths lead through
            positions = tuple(one for one in self.order if one < self.n_pos)[: self.n_dst]
            layers = [2 * layer + 1 for layer in layers]
        flow = make_flow([f"w{i}" for i in range(self.n_pos)], layers, self.n_heads, positions, seed=self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        flow.attn.mul_(10 ** (2 * torch.rand(self.n_layers, self.n_heads, 1, 1, generator=generator) - 1))
        if self.causal:
            later = torch.arange(self.n_pos)[:, None] > torch.tensor(positions)
            flow.attn[..., later] = 0
            flow.block[..., later] = 0

        def kind_of(kinds):
            return kinds[int(torch.randint(len(kinds), (), generator=generator))]

        if self.odd:
            _odd_columns(flow, self.causal, kind_of)
            _odd_steps(flow, kind_of)
        return flow

    def of_metric(self):
        tokens, layers = tuple(f"m{i}" for i in range(self.n_pos)), tuple(range(self.n_layers))
        flow = metric_flow(tokens, layers, self.n_heads, "m", self.seed)
        if self.odd:
            flow.total["attn"][0] = 0
        return flow


specs = st.builds(
    Spec,
    n_pos=st.integers(1, 6),
    n_heads=st.integers(1, 4),
    n_layers=st.integers(1, 3),
    order=st.permutations(range(6)).map(tuple),
    n_dst=st.one_of(st.none(), st.integers(1, 6)),
    causal=st.booleans(),
    odd=st.sampled_from((True, True, False)),
    seed=st.integers(0, 2**31),
)


def _odd_columns(flow, causal, kind_of):
    maps = [*flow.attn.unbind(1), flow.block]
    for row in range(len(flow.layers)):
        ends = [dst + 1 if causal else None for dst in flow.destinations]
        columns = [one[row][:end, c] for one in maps for c, end in enumerate(ends)]
        kinds = [kind_of(COLUMNS) for _ in columns]
        for column, kind in zip(columns, kinds, strict=True):
            if kind == "zero":
                column.zero_()
            elif isinstance(kind, str) and kind != "plain" and len(column) > 1:
                column[-1] = taking_back(column[:-1], times_of(kind))
        heads = len(columns) - len(flow.destinations)
        for some, of in ((slice(0, heads), flow.attn[row]), (slice(heads, None), flow.block[row])):
            strongest = float(of.abs().sum(-2).max())
            for column, kind in zip(columns[some], kinds[some], strict=True):
                if isinstance(kind, float) and len(column) > 1:
                    column.zero_()
                    column[0], column[1] = left_of_floor(strongest, kind, len(flow.tokens))


def _odd_steps(flow, kind_of):
    floors, of_mlp = [], []
    for row in range(len(flow.layers)):
        for c in range(len(flow.destinations)):
            kind = kind_of(STEPS)
            if flow.attn[0, ..., 0].numel() < 4 and isinstance(kind, float):
                continue  # beside the rounding of two numbers the floor would be too low to aim at
            if kind == "rest":
                flow.attn[row, :, :, c] = 0
            if kind in ("rest", "held"):
                flow.skip[row, c] = flow.bias[row, c] = 0
            if kind in ("cancels", "nearly"):
                flow.bias[row, c] = 0
                flow.skip[row, c] = taking_back(compose.edges(flow, "conserving").heads[row, :, :, c], times_of(kind))
            if isinstance(kind, float):
                flow.skip[row, c] = -compose.edges(flow, "conserving").heads[row, :, :, c].sum()
                flow.bias[row, c] = 0
                floors.append((row, c, kind))
            if isinstance(kind, tuple):
                flow.mlp[row, :, c] = flow.skip[row, c] = flow.bias[row, c] = 0
                of_mlp.append((row, c, kind[1]))
    terms = flow.columns("mlp")
    for row, c, part in of_mlp:
        flow.mlp[row, 0, c], flow.skip[row, c] = left_of_floor(terms[row].abs().sum(0).max(), part, terms.shape[1])
    found = compose.edges(flow, "conserving")
    strongest = (found.heads.abs().sum((1, 2)) + found.skip.abs()).amax(-1)
    for row, c, part in floors:
        flow.bias[row, c] = part * EPS * flow.attn.shape[1] * len(flow.tokens) * strongest[row]


def cancelling_steps(flow, rule):
    """In how many steps of each layer `compose` warns that sums nearly cancel."""
    counts = []
    for layer in flow.layers:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            compose.shares(flow.select(layers=(layer,)), rule)
        messages = [str(one.message) for one in told if one.category is lig_lens.CancellationWarning]
        counts.append(sum(int(message.split()[1]) for message in messages))
    return counts
