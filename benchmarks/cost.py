"""What `attribute` costs, in forward passes of the same model: python benchmarks/cost.py."""

import math
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import (
    RESULTS,
    ROWS,
    accuracy,
    attribute,
    device_of,
    environment,
    hf_model,
    layer_numbers,
    names,
    numbers,
    show,
    token_ids,
    write_results,
)
from timing import Side, alternate, peak_memory

import lig_lens

MIN_REPEATS = 3
SLOPE_FROM = 64


def main(
    models: Annotated[str, typer.Option(help="Names for load_model.")] = "minilm,smollm2",
    lengths: Annotated[str, typer.Option(help="Numbers of tokens.")] = "16,32,64,128,256,512",
    rows: Annotated[str, typer.Option(help="Maps and their baselines.")] = ",".join(ROWS),
    layers: Annotated[str, typer.Option(help="Block numbers, such as 0,3.")] = "all",
    repeats: Annotated[int, typer.Option(help="Timed runs of a cell; fewer where they are slow, 3 at least.")] = 5,
    budget: Annotated[float, typer.Option(help="Seconds for one cell: longer prompts that need more are left out.")] = (
        120.0
    ),
    tol: Annotated[float, typer.Option(help="Largest completeness gap.")] = 1e-3,
    engine: Annotated[str, typer.Option(help="auto, closed_form or hooks.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    text: Annotated[str | None, typer.Option(help="Prompt to cut to length; English prose by default.")] = None,
    out: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "cost.json",
) -> None:
    """Time every map and baseline against a plain forward pass, both in turn, by prompt length."""
    cells: list[dict[str, Any]] = []
    slopes: list[dict[str, Any]] = []
    chosen_rows, chosen_lengths = names(rows, ROWS), sorted(numbers(lengths))
    options = {"tol": tol, "engine": engine}
    place = torch.device(device)
    for name in names(models):
        model = lig_lens.load_model(name, device=device)
        plain = hf_model(model)
        place = device_of(model)
        options["layers"] = layer_numbers(layers, model)
        limit = int(getattr(plain.config, "max_position_embeddings", 2**31))
        fitting = [length for length in chosen_lengths if length <= limit]
        for row in chosen_rows:
            former: list[dict[str, Any]] = []
            for length in fitting:
                cell = _cell(model, plain, token_ids(model, length, text), row, options, repeats, budget, former)
                former.append({"model": name, "row": row, "tokens": length, **cell})
            cells += former
            slopes.append({"model": name, "row": row, "from": SLOPE_FROM, "slope": _slope(former)})
        _show(name, fitting, cells, slopes)
    settings = {**options, "layers": layers, "repeats": repeats, "budget_s": budget, "gap_is": "relative"}
    write_results(out, {"environment": environment(place), "settings": settings, "cells": cells, "slopes": slopes})


def _cell(
    model: Any,
    plain: Any,
    ids: torch.Tensor,
    row: str,
    options: dict[str, Any],
    repeats: int,
    budget: float,
    former: list[dict[str, Any]],
) -> dict[str, Any]:
    """Time one map and baseline at one length, unless shorter prompts say that it takes too long."""
    expected = (MIN_REPEATS + 1) * _expected_seconds(former, len(ids))
    if expected > budget:
        guess = f"would take about {expected:.0f} s" if expected < math.inf else "a shorter prompt was left out"
        return {"ratio": None, "reason": f"{guess}, the budget is {budget:g} s"}
    device = device_of(model)
    on_device = ids[None].to(device)

    def forward(of: Any) -> Any:
        with torch.no_grad():
            return of(on_device)

    passes = Side(lambda: forward(model), per_round=3)
    plain_passes = Side(lambda: forward(plain), per_round=3)
    ours = Side(lambda: attribute(model, ids, row, **options))
    for side in (passes, plain_passes):
        side.once(device)  # warm-up
    start = time.perf_counter()
    _, peaks = peak_memory(ours.run, device)  # warm-up too
    spent = time.perf_counter() - start
    affordable = max(min(repeats, MIN_REPEATS), min(repeats, int((budget / 4 - spent) / spent)))
    alternate((passes, plain_passes, ours), affordable, device)
    return {
        "ratio": ours.median / passes.median,
        "ratio_hf": ours.median / plain_passes.median,
        "attribute": ours.record(),
        "forward": passes.record(),
        "forward_hf": plain_passes.record(),
        **accuracy(ours.result, row.split(":")[0]),
        **peaks,
        "reason": None,
    }


def _expected_seconds(former: list[dict[str, Any]], length: int) -> float:
    """What one run takes if time goes on growing as it did (with the square of the length, at first)."""
    if not former:
        return 0.0
    if former[-1]["ratio"] is None:
        return math.inf
    last = former[-1]
    growth = 2.0
    if len(former) > 1:
        before = former[-2]
        ratio = last["attribute"]["ms"] / before["attribute"]["ms"]
        growth = max(1.0, math.log(ratio) / math.log(last["tokens"] / before["tokens"]))
    return float(last["attribute"]["ms"] / 1e3 * (length / last["tokens"]) ** growth)


def _slope(cells: list[dict[str, Any]]) -> float | None:
    """Least-squares slope of log time against log length, from `SLOPE_FROM` tokens on."""
    points = [(c["tokens"], c["attribute"]["ms"]) for c in cells if c["tokens"] >= SLOPE_FROM and c["ratio"]]
    if len(points) < 2:
        return None
    return statistics.linear_regression(*zip(*[(math.log(t), math.log(ms)) for t, ms in points], strict=True)).slope


def _show(name: str, lengths: list[int], cells: list[dict[str, Any]], slopes: list[dict[str, Any]]) -> None:
    table = []
    for line in (line for line in slopes if line["model"] == name):
        of_row = {c["tokens"]: c for c in cells if c["model"] == name and c["row"] == line["row"]}
        ratios = [of_row[length]["ratio"] for length in lengths]
        done = [c for c in of_row.values() if c["ratio"] is not None]
        peaks = [c["resident_peak_mib"] if c["gpu_peak_mib"] is None else c["gpu_peak_mib"] for c in done]
        table.append(
            [
                line["row"].replace(":", " "),
                *("-" if ratio is None else f"{ratio:.3g}" for ratio in ratios),
                "-" if line["slope"] is None else f"{line['slope']:.2f}",
                f"{min(c['converged'] for c in done):.2%}",
                f"{max(c['worst_gap'] for c in done):.1e}",
                "-" if None in peaks else f"{max(peaks):.0f}",
            ]
        )
    show(
        f"{name}: time of attribute() in forward passes",
        ["map baseline", *(f"T={length}" for length in lengths), "slope", "converged", "worst gap", "peak MiB"],
        table,
        f"Medians. slope: of log seconds against log T, from T={SLOPE_FROM} on. converged, worst gap and peak memory "
        "(above what was held before): the worst of all T. - : beyond the budget of a cell.",
    )


if __name__ == "__main__":
    typer.run(main)
