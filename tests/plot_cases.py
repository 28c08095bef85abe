"""Every figure once, for the tests that hold for all of them."""

import dataclasses
import functools

import torch
from flows import make_flow
from relevances import PATCHES, make_relevance

import lig_lens
from lig_lens import plots
from lig_lens.inputs.pictures import picture_of

RULES = ("product", "conserving")
HOSTILE = ("</script><script>alert(1)</script>", "\"quoted\" & 'more'", "<b>x</b>", "%{z}", "&lt;", "", "\n")


def metric_flow(tokens=HOSTILE, layers=(0, 1), n_heads=3, metric="<script>alert(2)</script>", seed=0):
    """A Flow of contributions to a metric: attn and skip of a layer add up to its total."""
    generator = torch.Generator().manual_seed(seed)
    n_pos = len(tokens)
    attn = torch.randn(len(layers), n_heads, n_pos, n_pos, generator=generator)
    skip = torch.randn(len(layers), n_pos, generator=generator)
    return lig_lens.Flow(
        tokens=tokens,
        special=(False,) * n_pos,
        layers=layers,
        model_name="tiny",
        settings={"target": metric, "tol": 1e-3, "metric": {"clean": 3.0, "corrupted": -1.5}},
        layouts=("pre_ln",) * len(layers),
        engines={"attn": ("hooks",) * len(layers)},
        attn=attn,
        skip=skip,
        total={"attn": attn.sum((1, 2, 3)) + skip.sum(1)},
        gap={"attn": torch.tensor([1e-5] * (len(layers) - 1) + [2e-3])},
        converged={"attn": torch.tensor([True] * (len(layers) - 1) + [False])},
        metric=metric,
    )


def image_flow(picture=None, layers=(0, 1)):
    """A Flow of an image of two by three patches, after one special position."""
    patches = [f"r{row}c{column}" for row in range(2) for column in range(3)]
    flow = make_flow(tokens=("[CLS]", *patches), layers=layers)
    image = picture_of(torch.rand(3, 8, 12)) if picture is None else picture
    return dataclasses.replace(flow, settings={**flow.settings, "pixels": {"grid": [2, 3], "image": image}})


CURVE = ((0.0, 0.5, 1.0), (1.0, 0.6, 0.2), (0.9, 0.5, 0.1), (1.1, 0.7, 0.3))


def hostile_relevance(tokens):
    """A Relevance whose names try to be markup."""
    return make_relevance(tokens, method="<b>%{z}</b>", target="<script>alert(4)</script>", model_name="<i>x</i>")


def make_effects(on, tokens=HOSTILE, layers=(0, 1), n_heads=3, seed=0):
    sizes = {"layer": len(layers), "head": n_heads} | dict.fromkeys(("pos", "src", "dst"), len(tokens))
    shape = [sizes[axis] for axis in lig_lens.flow.effects.AXES[on]]
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return lig_lens.Effects(
        values=values, on=on, name="<script>alert(3)</script>", tokens=tokens, layers=layers, metric="<b>m</b>"
    )


def every_figure(tokens=HOSTILE):
    """What draws a figure of each kind, by name, on tokens that try to be markup."""
    flow, metric = make_flow(tokens=tokens, layers=(0, 1)), metric_flow(tokens)
    other = make_flow(tokens=tokens, layers=(0, 1), seed=1)
    relevance, another = hostile_relevance(tokens), make_relevance(tokens, seed=1)
    effects = {on: make_effects(on, tokens) for on in lig_lens.flow.effects.AXES}
    return {
        "head_grid": lambda: plots.head_grid(flow),
        "head_grid of shares": lambda: plots.head_grid(flow, share=True, map="block"),
        "head_grid of a difference": lambda: plots.head_grid(flow, minus=other),
        "head_map": lambda: plots.head_map(flow, 1, 2),
        "importance of a metric": lambda: plots.importance(metric),
        "importance mlp": lambda: plots.importance(flow, map="mlp"),
        "importance attn": lambda: plots.importance(flow),
        "rollout_map": lambda: plots.rollout_map(flow),
        "consistency_plot": lambda: plots.consistency_plot([flow.consistency(rule=rule) for rule in RULES]),
        "image_map": lambda: plots.image_map(image_flow()),
        "gap_map": lambda: plots.gap_map(flow),
        "gap_map of a metric": lambda: plots.gap_map(metric),
        "paths_graph": lambda: plots.paths_graph(flow, dst=0),
        **{f"effects_map {on}": functools.partial(plots.effects_map, found) for on, found in effects.items()},
        "relevance_text": lambda: plots.relevance_text(relevance),
        "relevance_layers": lambda: plots.relevance_layers(relevance),
        "compare_relevance": lambda: plots.compare_relevance([relevance, another]),
        "relevance_image": lambda: plots.relevance_image([hostile_relevance(PATCHES), make_relevance(PATCHES)]),
        "deletion_curves": lambda: plots.deletion_curves({name: CURVE for name in tokens}, facts=tokens),
        "league": lambda: plots.league({"<b>m</b>": {name: (0.5, 0.4, 0.7) for name in tokens}}, facts=tokens),
        "agreement_scatter": lambda: plots.agreement_scatter(effects["edges"], make_effects("edges", tokens, seed=1)),
    }
