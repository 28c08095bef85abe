"""Time to the same accuracy with captum, with the hooks engine and with ours: python benchmarks/versus_captum.py."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import (
    RESULTS,
    accuracy,
    attribute,
    device_of,
    environment,
    hf_model,
    names,
    show,
    token_ids,
    write_results,
)
from hf_blocks import HfBlock, moved, start_of_path
from timing import Side, alternate
from torch import Tensor

import lig_lens

ROWS = ("attn:itb", "attn:zero", "block:itb", "block:zero")
FIRST_STEPS = 4
PATIENCE = 20.0


def main(
    models: Annotated[str, typer.Option(help="Names for load_model.")] = "minilm,smollm2",
    rows: Annotated[str, typer.Option(help="Maps and their baselines.")] = ",".join(ROWS),
    tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 64,
    layer: Annotated[int | None, typer.Option(help="Block number; the middle one by default.")] = None,
    head: Annotated[int, typer.Option(help="Head whose attn columns captum computes.")] = 0,
    sample: Annotated[int, typer.Option(help="Destinations that captum is timed on.")] = 4,
    max_steps: Annotated[int, typer.Option(help="Most steps that captum is given.")] = 2048,
    tol: Annotated[float, typer.Option(help="Largest completeness gap, relative.")] = 1e-3,
    repeats: Annotated[int, typer.Option(help="Timed rounds; one for what takes 20 s.")] = 3,
    batch_tokens: Annotated[int, typer.Option(help="Tokens that captum runs at once.")] = 4096,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    text: Annotated[str | None, typer.Option(help="Prompt to cut to length; English prose by default.")] = None,
    out: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "versus_captum.json",
) -> None:
    """Same block, tokens, path and scalar on all sides; captum gets the steps that it needs for the same gap."""
    cells: list[dict[str, Any]] = []
    for name in names(models):
        model = lig_lens.load_model(name, device=device)
        ids = token_ids(model, tokens, text)
        number = model.cfg.n_layers // 2 if layer is None else layer
        block = HfBlock(hf_model(model), ids, number)
        for row in names(rows, ROWS):
            captum = _captum(block, row, head, sample, tol, max_steps, max(1, batch_tokens // tokens))
            cell = _compare(model, ids, number, row, head, captum, tol, repeats)
            cells.append({"model": name, "layer": number, "tokens": tokens, "row": row, **cell})
    _show(cells, tol)
    settings = {"tol": tol, "head": head, "max_steps": max_steps, "batch_tokens": batch_tokens}
    write_results(out, {"environment": environment(torch.device(device)), "settings": settings, "cells": cells})


@dataclass
class _Captum:
    """Captum on a sample of destinations, with the number of steps that it was found to need."""

    columns: "Callable[[int], tuple[Tensor, float]]"
    destinations: list[int]
    steps: int
    gap: float


def _captum(block: HfBlock, row: str, head: int, sample: int, tol: float, max_steps: int, batch: int) -> _Captum:
    """Double the steps until the worst gap of the sampled destinations is within `tol`."""
    from captum.attr import IntegratedGradients

    name, baseline = row.split(":")
    resid = block.resid_pre
    run = block.resid_post if name == "block" else lambda values: block.heads(values)[:, :, head]

    def path(destination: int) -> tuple[Callable[[Tensor], Tensor], Tensor, float]:
        start = start_of_path(baseline, resid, destination)
        scalar = moved(run, start, destination)
        with torch.no_grad():
            return scalar, start, float(scalar(resid[None])[0])

    # A causal block's first token sees only itself: with itb its column is empty, and no gap is defined.
    totals = [path(j)[2] for j in range(len(resid))]
    moving = [j for j, total in enumerate(totals) if total > 1e-4 * max(totals)]
    picked = sorted({moving[round(i)] for i in torch.linspace(0, len(moving) - 1, sample).tolist()})

    def columns(steps: int) -> tuple[Tensor, float]:
        """Columns [src, sampled destination] and their worst gap."""
        found, gaps = [], []
        for destination in picked:
            scalar, start, total = path(destination)
            parts, delta = IntegratedGradients(scalar).attribute(
                resid[None],
                baselines=start[None],
                n_steps=steps,
                method="gausslegendre",
                internal_batch_size=batch,
                return_convergence_delta=True,
            )
            found.append(parts[0].sum(-1).detach())
            gaps.append(abs(float(delta)) / total)
        return torch.stack(found, -1), max(gaps)

    steps, gap = FIRST_STEPS, columns(FIRST_STEPS)[1]
    while gap > tol and steps < max_steps:
        steps *= 2
        gap = columns(steps)[1]
    return _Captum(columns, picked, steps, gap)


def _compare(
    model: Any, ids: Tensor, layer: int, row: str, head: int, captum: _Captum, tol: float, repeats: int
) -> dict[str, Any]:
    """Time the three sides in turn; captum's sampled destinations stand for all."""
    name = row.split(":")[0]
    device = device_of(model)
    sides = {
        engine: Side(lambda engine=engine: attribute(model, ids, row, layers=[layer], tol=tol, engine=engine))
        for engine in ("auto", "hooks")
    }
    for side in sides.values():
        side.once(device)  # warm-up; captum is warm from the search
    sides["captum"] = Side(lambda: captum.columns(captum.steps))
    alternate(list(sides.values()), repeats, device, PATIENCE)
    flows = {engine: sides[engine].result for engine in ("auto", "hooks")}
    ours = (flows["auto"].attn[0, head] if name == "attn" else flows["auto"].block[0])[:, captum.destinations]
    difference = (sides["captum"].result[0].cpu() - ours).abs().amax(0) / ours.abs().amax(0)
    per_destination = sides["captum"].median / len(captum.destinations)
    seconds = per_destination * len(ids)
    heads = flows["auto"].attn.shape[1] if name == "attn" else 1
    return {
        "captum": {
            "steps": captum.steps,
            "worst_gap": captum.gap,
            "reached_tol": captum.gap <= tol,
            "destinations_timed": captum.destinations,
            "seconds_per_destination": per_destination,
            "seconds": seconds,
            "heads": 1 if name == "attn" else None,
            "repeats": len(sides["captum"].seconds),
        },
        **{engine: {**sides[engine].record(), **accuracy(flow, name)} for engine, flow in flows.items()},
        "captum_over_auto": seconds / sides["auto"].median,
        "captum_all_heads_over_auto": heads * seconds / sides["auto"].median,
        "captum_over_hooks": seconds / sides["hooks"].median,
        "hooks_over_auto": sides["hooks"].median / sides["auto"].median,
        "largest_difference": float(difference.max()),
    }


def _show(cells: list[dict[str, Any]], tol: float) -> None:
    table = []
    for cell in cells:
        captum = cell["captum"]
        ratio = f"{cell['captum_over_auto']:.3g}"
        table.append(
            [
                f"{cell['model']} {cell['layer']} {cell['row'].replace(':', ' ')}",
                f"{captum['steps']}" if captum["reached_tol"] else f"{captum['steps']}, not reached",
                f"{captum['worst_gap']:.1e}",
                f"{captum['seconds']:.2f} ({len(captum['destinations_timed'])}/{cell['tokens']}, {captum['repeats']})",
                "/".join(cell["auto"]["engines"]),
                f"{cell['auto']['worst_gap']:.1e}",
                f"{cell['auto']['ms'] / 1e3:.3f} ({cell['auto']['repeats']})",
                ratio if captum["reached_tol"] else f"> {ratio}",
                "" if captum["heads"] is None else f"{cell['captum_all_heads_over_auto']:.3g}",
                f"{cell['hooks_over_auto']:.3g}",
                f"{cell['largest_difference']:.0e}",
            ]
        )
    header = ["model block row", "steps", "gap", "captum s", "engine", "gap", "ours s", "captum/ours", "all heads"]
    show(
        f"One block at a gap of at most {tol:g}: seconds and their ratio",
        [*header, "hooks/ours", "differ by"],
        table,
        "captum s: all destinations, extrapolated from the sampled ones (sampled/all, rounds). attn: captum computes "
        "one head, ours all; 'all heads' is the ratio for all. ours s: with the model's forward pass and all checks "
        "(rounds). differ by: largest difference of a contribution, relative to the largest of its column.",
    )


if __name__ == "__main__":
    typer.run(main)
