"""Which composition comes nearest the directly measured block map: python benchmarks/consistency.py."""

from pathlib import Path
from typing import Annotated, Any

import pandas
import torch
import typer
from common import RESULTS, environment, show, write_results
from tqdm.auto import tqdm

import lig_lens

SENTENCES = (
    "The old fisherman repaired his net before the tide came in.",
    "She forgot where she had parked the car last night.",
    "Nobody in the village knew why the bells were ringing.",
    "The committee will publish its report early next month.",
    "My brother plays the cello in a small orchestra.",
    "Heavy rain washed the bridge away two years ago.",
    "The recipe asks for three eggs and a cup of sugar.",
    "He answered every question without looking at his notes.",
    "The museum that we wanted to visit was closed on Monday.",
    "A good map is worth more than a fast horse.",
    "The price of copper fell again after the strike ended.",
    "Children were building a castle out of wet sand.",
    "The letter arrived a week after she had moved out.",
    "Our train stopped twice in the middle of the forest.",
    "The doctor who treated him has retired since then.",
    "They painted the kitchen yellow and the door green.",
    "An unknown artist carved the statue from a single stone.",
    "The dog barked at the postman, but it never bit him.",
    "Scientists measured the ice at both ends of the lake.",
    "If the engine is cold, it needs a minute to start.",
)
ATTN = ("zero", "itb", "itb_zero_ratio", "itb_map_ratio")
MLP = ("zero", "att_itb_a0")
BLOCK = ("zero", "itb", "itb_zero_ratio")
NAMES = ["attn_baseline", "mlp_baseline", "rule", "block_baseline"]


def main(
    model: Annotated[str, typer.Option(help="Name for load_model.")] = "minilm",
    sentences: Annotated[int, typer.Option(help="How many of the twenty.")] = len(SENTENCES),
    tol: Annotated[float, typer.Option(help="Largest completeness gap, relative.")] = 1e-3,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    out: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "consistency.json",
) -> None:
    """Table of 3 direct baselines and 8 compositions by both rules, means over layers, tokens and sentences."""
    hooked = lig_lens.load_model(model, device=device)
    tables = []
    for sentence in tqdm(SENTENCES[:sentences]):

        def measured(name: str, baseline: str, sentence: str = sentence) -> Any:
            options: dict[str, Any] = {"maps": name, f"{name}_baseline": baseline, "tol": tol, "progress": False}
            return lig_lens.attribute(hooked, sentence, **options)

        flows = [measured(name, b) for name, group in (("attn", ATTN), ("mlp", MLP), ("block", BLOCK)) for b in group]
        tables.append(lig_lens.consistency_table(flows))
    together = pandas.concat(tables).groupby(NAMES, sort=False)
    mean, error = together.mean(), together.sem()
    rows = []
    for direct in BLOCK:
        chosen = mean.xs(direct, level="block_baseline").sort_values("l2_normalised")
        for (attn, mlp, rule), row in chosen.iterrows():
            spread = error.loc[(attn, mlp, rule, direct)]
            cells = [f"{row[c]:.3f} ± {spread[c]:.3f}" for c in ("l2", "l2_normalised", "pearson")]
            rows.append([direct, attn, mlp, rule, *cells])
    show(
        f"{model}: composed against directly measured block maps, {sentences} sentences, tol {tol}",
        ["direct", "attn", "mlp", "rule", "L2", "L2 / length of direct", "Pearson"],
        rows,
        "Means over layers, destinations and sentences, with standard errors over sentences; nearest first.",
    )
    settings = {"model": model, "sentences": list(SENTENCES[:sentences]), "tol": tol}
    records = mean.reset_index().to_dict("records")
    write_results(out, {"settings": settings, "environment": environment(torch.device(device)), "cells": records})


if __name__ == "__main__":
    typer.run(main)
