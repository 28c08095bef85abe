"""What the benchmarks share: text, models, the record of the environment, tables and JSON."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import lig_lens
from lig_lens.errors import ConvergenceWarning
from lig_lens.files import write_atomic

RESULTS = Path(__file__).parent / "results"
# Map and baseline of every row that the benchmarks know.
ROWS = ("attn:itb", "attn:zero", "mlp:att_itb_a0", "mlp:zero", "block:itb", "block:zero")

_SENTENCES = (
    "In the spring of that year {a} opened a small workshop behind the {b} and began to repair old clocks.",
    "Nobody in the village had asked for one, but before long every {b} seemed to own something that had stopped.",
    "{a} kept a notebook of each repair: what was broken, who had brought it, and how long it took to find the fault.",
    "When the river rose, the {b} was closed for nine days, and the only light in the street came from the workshop.",
    "'If it ticks, it is not finished,' {a} used to say, 'because something that ticks can still be late.'",
    "Some customers came back only to talk, which was never written down, although it took more time than the springs.",
    "By winter there were more letters than clocks, and {a} answered them at night while the glue was drying.",
    "One of them asked whether a clock that runs backwards could be sold to the {b}; the answer was a careful no.",
)
_NAMES = ("Mary", "Oskar", "Leila", "Tom", "Ingrid", "Paul")
_PLACES = ("bakery", "school", "post office", "harbour", "church", "mill", "library")


def english(repeats: int = 1) -> str:
    """Give plain English prose, whose names and places change every time it comes round."""
    rounds = range(repeats)
    return " ".join(
        s.format(a=_NAMES[k % len(_NAMES)], b=_PLACES[(k + i) % len(_PLACES)])
        for k in rounds
        for i, s in enumerate(_SENTENCES)
    )


def token_ids(model: Any, length: int, text: str | None = None) -> torch.Tensor:
    """Ids [pos] of the first `length` tokens of `text`, special tokens included; of English prose by default."""
    repeats = 1
    while True:
        given = english(repeats) if text is None else text
        ids = model.tokenizer(given, truncation=True, max_length=length)["input_ids"]
        if len(ids) == length:
            return torch.tensor(ids)
        if text is not None or repeats * len(_SENTENCES) > 2 * length:
            raise SystemExit(f"The text has {len(ids)} tokens, {length} are asked for: give a longer one.")
        repeats *= 2


def hf_model(model: Any, **options: Any) -> Any:
    """Load the Hugging Face model behind a bridge a second time, free of the bridge's hooks.

    Args:
        model: a TransformerBridge that was loaded from a folder or a hub id.
        options: for `from_pretrained`.
    """
    from transformers.utils import logging

    original = model.original_model
    logging.disable_progress_bar()
    device = next(model.parameters()).device
    return type(original).from_pretrained(original.config._name_or_path, **options).to(device).eval()


def names(text: str, known: Sequence[str] = ()) -> list[str]:
    """Split 'a,b'; every name must be among `known`, if there are any."""
    chosen = [name.strip() for name in text.split(",") if name.strip()]
    wrong = [name for name in chosen if known and name not in known]
    if wrong or not chosen:
        raise SystemExit(f"{', '.join(wrong) or 'An empty list'} is not one of {', '.join(known)}.")
    return chosen


def numbers(text: str) -> list[int]:
    """Split '16,32'."""
    return [int(number) for number in names(text)]


def layer_numbers(text: str, model: Any) -> list[int]:
    """Split '0,3'; 'all' stands for every layer of `model`."""
    return list(range(model.cfg.n_layers)) if text == "all" else numbers(text)


def attribute(model: Any, ids: torch.Tensor, row: str, **options: Any) -> Any:
    """Run `lig_lens.attribute` for one map and baseline, without bar or warning: benchmarks record the gaps."""
    name, baseline = row.split(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return lig_lens.attribute(model, ids, maps=(name,), progress=False, **{f"{name}_baseline": baseline}, **options)


def accuracy(flow: Any, name: str) -> dict[str, Any]:
    """How exact the `name` map of a Flow is, and what computed it."""
    return {
        "engines": sorted(set(flow.engines[name])),
        "cells": flow.gap[name].numel(),
        "converged": float(flow.converged[name].float().mean()),
        "worst_gap": float(flow.gap[name].max()),
        "mean_gap": float(flow.gap[name].mean()),
    }


def device_of(model: Any) -> torch.device:
    """Where the weights of `model` are."""
    return next(model.parameters()).device


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Versions, processor, threads and load, so that a number can be placed."""
    versions = {}
    for name in ("lig-lens", "torch", "transformer-lens", "transformers", "captum"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    on_gpu = device is not None and device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": versions,
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
    """Print a table; columns after the first are right-aligned."""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for number, column in enumerate(header):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write `results` as JSON and say where."""
    if path.parent == RESULTS:
        RESULTS.mkdir(exist_ok=True)
    write_atomic(path, (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    Console().print(f"Written: {path}", soft_wrap=True)
