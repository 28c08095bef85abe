"""Which scores foretell what interventions find: python benchmarks/versus_intervention.py."""

import dataclasses
import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import RESULTS, environment, show, write_results
from tqdm.auto import tqdm

import lig_lens
from lig_lens import patching
from lig_lens.flow.effects import Effects
from lig_lens.flow.flow import Flow
from lig_lens.inputs.induction import induction_pairs
from lig_lens.inputs.ioi import ioi_pairs
from lig_lens.targets.metrics import Metric

LIG, LIG_BY_MESSAGE = "LIG metric", "LIG metric, by message"
COLUMNS = ("spearman", "spearman_size", "pearson", "top_k_overlap", "average_precision")


def main(
    model: Annotated[str, typer.Option(help="smollm2 (IOI prompts) or induction.")] = "smollm2",
    pairs: Annotated[int, typer.Option(help="Pairs of clean and corrupted prompts.")] = 24,
    top: Annotated[int, typer.Option(help="Strongest edges of each score that are knocked out.")] = 200,
    tol: Annotated[float, typer.Option(help="Of the contributions.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Of the draw of prompts.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    out: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "versus_intervention.json",
) -> None:
    """Spearman and more between each score and (a) patching of heads, (b) knock-outs of the scores' strongest edges."""
    hooked = lig_lens.load_model(model, device=device)
    drawn: Any = induction_pairs(pairs, seed=seed) if model == "induction" else ioi_pairs(pairs, hooked.tokenizer, seed)
    found: dict[str, list[dict[str, Any]]] = {}
    right, n_edges, gaps = 0, [], []
    for pair in tqdm(drawn):
        metric = lig_lens.logit_difference(pair.answer, pair.wrong)
        flows = _splits(hooked, pair, metric, tol)
        flow = flows[LIG]
        gaps.append(max(one.worst_gap() for one in flows.values()))
        right += flow.settings["metric"]["clean"] > 0 > flow.settings["metric"]["corrupted"]
        scores = {**flows, **lig_lens.scores(hooked, pair.clean, pair.corrupted, metric)}
        by_head = {LIG: flow} | lig_lens.scores(hooked, pair.clean, pair.corrupted, metric, on="heads_by_pos")
        into, out_of = (
            patching.patch(
                hooked, pair.clean, pair.corrupted, metric, each_position=False, noising=noising, progress=False
            )
            for noising in (False, True)
        )
        union = sorted({edge for score in scores.values() for edge in patching.top_edges(score, top)})
        n_edges.append(len(union))
        zeroed = patching.knock_out(hooked, pair.clean, metric, edges=union, progress=False)
        put_in, taken_out = (
            patching.knock_out(hooked, run, metric, edges=union, corrupted=other, progress=False)
            for run, other in ((pair.corrupted, pair.clean), (pair.clean, pair.corrupted))
        )
        kinds = (
            ("heads", into, by_head),
            ("heads, both ways", _mean_effects(into, out_of.values), by_head),
            ("edges out", zeroed, scores),
            ("edges patched", taken_out, scores),
            # An edge that is put into the corrupted run lowers f(corrupted) - f(patched).
            ("edges, both ways", _mean_effects(taken_out, -put_in.values), scores),
        )
        for what, effects, ours in kinds:
            for name, row in lig_lens.compare_table(ours, effects, k=20).iterrows():
                # JSON knows no NaN.
                known = {key: value if value == value else None for key, value in row.to_dict().items()}
                found.setdefault(f"{what}|{name}", []).append(known)
    if model == "induction":
        _known_circuit(hooked, drawn)
    rows = []
    for key, values in found.items():
        what, name = key.split("|")
        rows.append([what, name, *(_mean([value[column] for value in values]) for column in COLUMNS)])
    show(
        f"{model}: {pairs} pairs ({right} with the right sign on both prompts), tol {tol}, worst gap {max(gaps):.1e}, "
        f"{min(n_edges)} to {max(n_edges)} edges",
        ["effects", "score", *COLUMNS],
        rows,
        "Means over pairs and standard errors. heads: clean output put into the corrupted run, all positions; edges "
        "out: pattern entry zeroed in the clean run; edges patched: message of the corrupted run put into the clean "
        "one; both ways: mean of that and of the same with the runs exchanged. _size: of absolute values.",
    )
    cells = [
        {"effects": key.split("|")[0], "score": key.split("|")[1], "pair": number, **row}
        for key, values in found.items()
        for number, row in enumerate(values)
    ]
    settings = {"model": model, "pairs": pairs, "top": top, "tol": tol, "seed": seed}
    write_results(out, {"settings": settings, "environment": environment(torch.device(device)), "cells": cells})


def _splits(hooked: Any, pair: Any, metric: Metric, tol: float = 1e-3) -> dict[str, Flow]:
    return {
        name: lig_lens.attribute(
            hooked, pair.clean, corrupted=pair.corrupted, target=metric, split=split, tol=tol, progress=False
        )
        for name, split in ((LIG, "source"), (LIG_BY_MESSAGE, "message"))
    }


def _mean_effects(effects: Effects, others: torch.Tensor) -> Effects:
    return dataclasses.replace(effects, values=(effects.values + others) / 2)


def _known_circuit(hooked: Any, pairs: list[Any]) -> None:
    """Print how many of the edges that the task needs each score finds; its heads are found by mean ablation."""
    metrics = [lig_lens.logit_difference(pair.answer, pair.wrong) for pair in pairs]
    others = [pair.clean for pair in pairs]
    lost = [patching.ablate(hooked, p.clean, m, others, progress=False) for p, m in zip(pairs, metrics, strict=True)]
    mean = lig_lens.average(lost).mean.values
    previous, induction = mean.argmax(1).tolist()
    hits: dict[str, list[float]] = {}
    for pair, metric in zip(pairs, metrics, strict=True):
        true = {(0, previous, *edge) for edge in pair.edges["previous"]}
        true |= {(1, induction, *edge) for edge in pair.edges["induction"]}
        flows = _splits(hooked, pair, metric)
        scores = {**flows, **lig_lens.scores(hooked, pair.clean, pair.corrupted, metric)}
        for name, score in scores.items():
            hits.setdefault(name, []).append(len(true & set(patching.top_edges(score, len(true)))) / len(true))
        strongest = flows[LIG].attn.sum((2, 3))
        hits.setdefault("LIG: known head first in layer 0", []).append(float(strongest[0].argmax() == previous))
        hits.setdefault("LIG: known head first in layer 1", []).append(float(strongest[1].argmax() == induction))
    show(
        f"Known circuit: heads 0.{previous} and 1.{induction} by mean ablation",
        ["score", "precision at the number of true edges"],
        [[name, _mean(values)] for name, values in hits.items()],
    )


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return "-"
    return f"{statistics.mean(known):+.3f} ± {statistics.stdev(known) / len(known) ** 0.5:.3f}"


if __name__ == "__main__":
    typer.run(main)
