"""How much memory `attribute` needs beyond the model and its result: python benchmarks/memory.py.

Every row runs in a process of its own, so that nothing is left over from another; the peak is the process's.
"""

import json
import subprocess
import sys
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
    layer_numbers,
    names,
    show,
    token_ids,
    write_results,
)
from timing import MIB, peak_memory

import lig_lens


def main(
    model: Annotated[str, typer.Option(help="Name for load_model.")] = "smollm2",
    tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 512,
    rows: Annotated[str, typer.Option(help="Maps and their baselines.")] = ",".join(ROWS),
    layers: Annotated[str, typer.Option(help="Block numbers, such as 0,3.")] = "all",
    engine: Annotated[str, typer.Option(help="auto, closed_form or hooks.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    limit: Annotated[float, typer.Option(help="Seconds for one row.")] = 600.0,
    text: Annotated[str | None, typer.Option(help="Prompt to cut to length; English prose by default.")] = None,
    out: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "memory.json",
    child: Annotated[bool, typer.Option(hidden=True, help="Measure the one row here and print it.")] = False,
) -> None:
    """Peak memory of every map and baseline beyond model and result."""
    chosen = names(rows, ROWS)
    if child:
        print(json.dumps(_measure(model, tokens, chosen[0], layers, engine, device, text)))
        return
    settings = {"model": model, "tokens": tokens, "layers": layers, "engine": engine, "device": device}
    done = [{"row": row, **_in_child(row, settings, text, limit)} for row in chosen]
    show(
        f"{model}, {tokens} tokens, layers {layers}: peak memory beyond model and result, MiB",
        ["map baseline", "peak", "on the GPU", "result", "seconds", "worst gap"],
        [
            [
                cell["row"].replace(":", " "),
                *(_mib(cell.get(key)) for key in ("peak_mib", "gpu_peak_mib", "result_mib")),
                "-" if cell["reason"] else f"{cell['seconds']:.1f}",
                "-" if cell["reason"] else f"{cell['worst_gap']:.1e}",
            ]
            for cell in done
        ],
        "Resident memory of a process that does nothing else, one run each; - : not known, or not finished in time.",
    )
    write_results(out, {"environment": environment(torch.device(device)), "settings": settings, "cells": done})


def _in_child(row: str, settings: dict[str, Any], text: str | None, limit: float) -> dict[str, Any]:
    options = {**settings, "rows": row, **({} if text is None else {"text": text})}
    command = [sys.executable, __file__, "--child", *(f"--{key}={value}" for key, value in options.items())]
    try:
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=limit, check=True)
    except subprocess.TimeoutExpired:
        return {"reason": f"not finished after {limit:g} s"}
    return {**json.loads(run.stdout.splitlines()[-1]), "reason": None}


def _measure(
    name: str, tokens: int, row: str, layers: str, engine: str, device: str, text: str | None
) -> dict[str, Any]:
    model = lig_lens.load_model(name, device=device)
    ids = token_ids(model, tokens, text)
    start = time.perf_counter()
    flow, peaks = peak_memory(
        lambda: attribute(model, ids, row, layers=layer_numbers(layers, model), engine=engine), device_of(model)
    )
    seconds = time.perf_counter() - start
    held = [flow.attn, flow.mlp, flow.skip, flow.bias, flow.block, *flow.total.values(), *flow.gap.values()]
    result = sum(tensor.nbytes for tensor in held if tensor is not None) / MIB
    resident = peaks["resident_peak_mib"]
    return {
        "peak_mib": None if resident is None else max(0.0, resident - result),  # results are kept on the CPU
        "gpu_peak_mib": peaks["gpu_peak_mib"],
        "result_mib": result,
        "seconds": seconds,
        **accuracy(flow, row.split(":")[0]),
    }


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


if __name__ == "__main__":
    typer.run(main)
