"""How much memory `attribute` needs beyond the model and its result: python benchmarks/memory.py.

Every row runs in a process of its own, so that nothing is left over from another; the peak is the process's. Before,
the row runs on a tiny model there, so that code which is loaded when it is first needed does not count; nor does memory
that is free again and that glibc would keep for later (about 100 MiB).
"""

import json
import os
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

# A metric's run goes through the whole model; its path starts in the prompt read backwards.
_METRIC = "metric:corrupted"


def main(
    model: Annotated[str, typer.Option(help="Name for load_model.")] = "smollm2",
    tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 512,
    rows: Annotated[str, typer.Option(help=f"Maps and their baselines, {_METRIC}.")] = ",".join(ROWS),
    layers: Annotated[str, typer.Option(help="Block numbers, such as 0,3.")] = "all",
    engine: Annotated[str, typer.Option(help="auto, closed_form or hooks.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16, ...")] = "float32",
    batch_tokens: Annotated[
        int | None, typer.Option(help="max_batch_tokens; 1 keeps activations small, which shows the weights' share.")
    ] = None,
    limit: Annotated[float, typer.Option(help="Seconds for one row.")] = 600.0,
    text: Annotated[str | None, typer.Option(help="Prompt to cut to length; English prose by default.")] = None,
    out: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "memory.json",
    child: Annotated[bool, typer.Option(hidden=True, help="Measure the one row here and print it.")] = False,
) -> None:
    """Peak memory of every map and baseline beyond model and result."""
    chosen = names(rows, (*ROWS, _METRIC))
    if child:
        print(json.dumps(_measure(model, tokens, chosen[0], layers, engine, device, dtype, batch_tokens, text)))
        return
    settings = {"model": model, "tokens": tokens, "layers": layers, "engine": engine, "device": device, "dtype": dtype}
    if batch_tokens is not None:
        settings["batch-tokens"] = batch_tokens
    done = [{"row": row, **_in_child(row, settings, text, limit)} for row in chosen]
    show(
        f"{model}, {dtype}, {tokens} tokens, layers {layers}: peak memory beyond model and result, MiB",
        ["map baseline", "peak", "on the GPU", "result", "weights", "with them", "seconds", "worst gap"],
        [
            [
                cell["row"].replace(":", " "),
                *(_mib(cell.get(key)) for key in ("peak_mib", "gpu_peak_mib", "result_mib", "weights_mib")),
                _times(cell),
                "-" if cell["reason"] else f"{cell['seconds']:.1f}",
                "-" if cell["reason"] else f"{cell['worst_gap']:.1e}",
            ]
            for cell in done
        ],
        "Resident memory of a process that does nothing else, one run each; with them: peak and weights, relative to "
        "the weights. - : not known, or not finished in time.",
    )
    write_results(out, {"environment": environment(torch.device(device)), "settings": settings, "cells": done})


def _in_child(row: str, settings: dict[str, Any], text: str | None, limit: float) -> dict[str, Any]:
    options = {**settings, "rows": row, **({} if text is None else {"text": text})}
    command = [sys.executable, __file__, "--child", *(f"--{key}={value}" for key, value in options.items())]
    try:
        given_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=limit, check=True, env=given_back)
    except subprocess.TimeoutExpired:
        return {"reason": f"not finished after {limit:g} s"}
    return {**json.loads(run.stdout.splitlines()[-1]), "reason": None}


def _measure(
    name: str,
    tokens: int,
    row: str,
    layers: str,
    engine: str,
    device: str,
    dtype: str,
    batch_tokens: int | None,
    text: str | None,
) -> dict[str, Any]:
    options: dict[str, Any] = {"engine": engine}
    if batch_tokens is not None:
        options["max_batch_tokens"] = batch_tokens
    small = lig_lens.load_model("induction", device=device, dtype=dtype)
    _run(small, torch.arange(2, 2 + min(tokens, 16)), row, layers=[0], **options)
    model = lig_lens.load_model(name, device=device, dtype=dtype)
    ids = token_ids(model, tokens, text)
    start = time.perf_counter()
    flow, peaks = peak_memory(
        lambda: _run(model, ids, row, layers=layer_numbers(layers, model), **options), device_of(model)
    )
    seconds = time.perf_counter() - start
    held = [flow.attn, flow.mlp, flow.skip, flow.bias, flow.block, *flow.total.values(), *flow.gap.values()]
    result = sum(tensor.nbytes for tensor in held if tensor is not None) / MIB
    resident = peaks["resident_peak_mib"]
    return {
        "peak_mib": None if resident is None else max(0.0, resident - result),  # results are kept on the CPU
        "gpu_peak_mib": peaks["gpu_peak_mib"],
        "result_mib": result,
        "weights_mib": sum(weight.nbytes for weight in model.parameters()) / MIB,
        "seconds": seconds,
        **accuracy(flow, "attn" if row == _METRIC else row.split(":")[0]),
    }


def _run(model: Any, ids: torch.Tensor, row: str, **options: Any) -> Any:
    if row != _METRIC:
        return attribute(model, ids, row, **options)
    target = lig_lens.logit_difference(5, 6)
    return attribute(model, ids, "attn:corrupted", target=target, corrupted=ids.flip(0), **options)


def _times(cell: dict[str, Any]) -> str:
    peak = cell.get("peak_mib")
    return "-" if peak is None else f"{1 + peak / cell['weights_mib']:.2f}"


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


if __name__ == "__main__":
    typer.run(main)
