"""Time and gaps of the released LIG package beside ours, on MiniLM: python benchmarks/versus_released_lig.py."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import (
    RESULTS,
    accuracy,
    attribute,
    device_of,
    english,
    environment,
    layer_numbers,
    names,
    show,
    write_results,
)
from timing import Side, alternate

import lig_lens

# Their granularity and letters for each of our maps.
MAPS = {"attn": ("att", "z→u"), "mlp": ("mlp", "u→z"), "block": ("layer", "z→z")}
ROWS = ("attn:itb", "mlp:zero", "mlp:att_itb_a0", "block:itb", "block:zero")
PACKAGE = "layer-wise-integrated-gradients==0.1.0"
# torch first and at one version, so that the package's unpinned requirement does not choose another.
INSTALL = (("torch==2.13.0",), (PACKAGE, "transformers<5"))
PATIENCE = 20.0
WARM_UP_TOKENS = 8


def main(
    rows: Annotated[str, typer.Option(help="Maps and their baselines.")] = ",".join(ROWS),
    blocks: Annotated[str, typer.Option(help="Block numbers, such as 0,3.")] = "all",
    tokens: Annotated[int, typer.Option(help="Length of the prompt for mlp and block.")] = 64,
    attn_tokens: Annotated[int, typer.Option(help="Length of the prompt for attn.")] = 19,
    tol: Annotated[float, typer.Option(help="Our largest completeness gap; theirs takes 32 steps.")] = 1e-3,
    repeats: Annotated[int, typer.Option(help="Timed rounds; one for what takes 20 s.")] = 3,
    out: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "versus_released_lig.json",
) -> None:
    """Run both on the same block and tokens in turn: theirs at its default 32 steps, ours to `tol`."""
    model = lig_lens.load_model("minilm", device="cpu")
    child = Child(installed(cache_folder()), model.original_model.config._name_or_path)
    cells: list[dict[str, Any]] = []
    totals: list[dict[str, Any]] = []
    try:
        for row in names(rows, ROWS):
            text = prose(model.tokenizer, attn_tokens if row.startswith("attn") else tokens)
            warm = prose(model.tokenizer, WARM_UP_TOKENS)
            chosen = layer_numbers(blocks, model)
            of_row = [_compare(model, child, row, n, text, warm, tol, repeats) for n in chosen]
            cells += of_row
            totals.append(_total(model, of_row, text, chosen, tol, repeats))
    finally:
        child.close()
    _show(cells, totals, tol)
    record = {"environment": environment(), "theirs": {"package": PACKAGE, "steps": 32, **child.versions}}
    write_results(out, {**record, "settings": {"tol": tol}, "cells": cells, "totals": totals})


def cache_folder() -> Path:
    """Where the package's virtual environment is kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "lig_lens" / "released_lig_venv"


def installed(folder: Path) -> Path:
    """Give the Python of the virtual environment in `folder`, which is made on first use."""
    python = folder / "bin" / "python"
    complete = folder / "complete"
    if not complete.exists():
        print(f"Installing {PACKAGE} into {folder}, about 1.5 GB ...", file=sys.stderr)
        venv.create(folder, clear=True, with_pip=True)
        free = {key: value for key, value in os.environ.items() if key != "PIP_CONSTRAINT"}
        for packages in INSTALL:
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True, env=free)
        complete.touch()
    return python


def prose(tokenizer: Any, length: int) -> str:
    """Give the longest beginning of the English prose that has at most `length` tokens."""
    words = english(length // 8 + 1).split()
    fitting = [n for n in range(1, length) if len(tokenizer(" ".join(words[:n]))["input_ids"]) <= length]
    return " ".join(words[: fitting[-1]])


class Child:
    """The released package in a process of its own, with its faster setting on a CPU (no torch.compile)."""

    def __init__(self, python: Path, folder: str) -> None:
        script = Path(__file__).with_name("released_lig_child.py")
        self._log = (python.parent.parent / "child.log").open("w+")
        self._process = subprocess.Popen(
            [python, script, folder, str(torch.get_num_threads())],
            env={**os.environ, "PTB_USE_TORCH_COMPILE": "false", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.versions: dict[str, Any] = self._read()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"The released package stopped: see {self._log.name}.")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
        self._log.close()


def _compare(
    model: Any, child: Child, row: str, layer: int, text: str, warm: str, tol: float, repeats: int
) -> dict[str, Any]:
    name, baseline = row.split(":")
    asked = {"granularity": MAPS[name][0], "layer": layer, "baseline": baseline}
    ids = torch.tensor(model.tokenizer(text)["input_ids"])
    ours = Side(lambda: attribute(model, ids, row, layers=[layer], tol=tol))
    theirs = Side(lambda: child.ask("explain", text=text, **asked))
    ours.once(device_of(model))  # warm-up
    child.ask("explain", text=warm, **asked)
    alternate((ours, theirs), repeats, device_of(model), PATIENCE)
    if theirs.result["tokens"] != list(ours.result.tokens):
        raise SystemExit(f"Other tokens there: {theirs.result['tokens']}, here: {ours.result.tokens}.")
    return {
        "row": row,
        "layer": layer,
        "tokens": len(ids),
        "theirs": {**theirs.record(), **child.ask("gaps")},
        "ours": {**ours.record(), **accuracy(ours.result, name)},
        "ratio": theirs.median / ours.median,
    }


def _total(
    model: Any, cells: list[dict[str, Any]], text: str, layers: list[int], tol: float, repeats: int
) -> dict[str, Any]:
    """All blocks of one row together: our one call for them against the sum of theirs, which takes one block a call."""
    row = cells[0]["row"]
    ids = torch.tensor(model.tokenizer(text)["input_ids"])
    ours = Side(lambda: attribute(model, ids, row, layers=layers, tol=tol))
    ours.once(device_of(model))  # warm-up
    alternate((ours,), max(repeats, 3), device_of(model))
    theirs = {
        "ms": sum(cell["theirs"]["ms"] for cell in cells),
        "repeats": min(cell["theirs"]["repeats"] for cell in cells),
        "worst_gap": max(cell["theirs"]["worst_gap"] for cell in cells),
    }
    return {
        "row": row,
        "layer": f"all {len(cells)}",
        "tokens": cells[0]["tokens"],
        "theirs": theirs,
        "ours": {**ours.record(), **accuracy(ours.result, row.split(":")[0])},
        "ratio": theirs["ms"] / (1e3 * ours.median),
    }


def _show(cells: list[dict[str, Any]], totals: list[dict[str, Any]], tol: float) -> None:
    table = []
    for total in totals:
        single = [cell for cell in cells if cell["row"] == total["row"]]
        for cell in [*single, total] if len(single) > 1 else single:
            theirs, ours = cell["theirs"], cell["ours"]
            median = f"{theirs['median_gap']:.1%}" if "median_gap" in theirs else ""
            table.append(
                [
                    f"{MAPS[cell['row'].split(':')[0]][1]} {cell['row'].replace(':', ' ')}",
                    str(cell["layer"]),
                    str(cell["tokens"]),
                    f"{theirs['ms'] / 1e3:.2f} ({theirs['repeats']})",
                    f"{theirs['worst_gap']:.1%}",
                    median,
                    f"{ours['ms'] / 1e3:.3f} ({ours['repeats']})",
                    f"{ours['worst_gap']:.2%}",
                    f"{cell['ratio']:.3g}",
                ]
            )
    show(
        f"MiniLM: {PACKAGE}, 32 steps, and lig_lens at tol={tol:g}",
        ["map baseline", "block", "T", "theirs s", "worst gap", "median", "ours s", "worst gap", "theirs/ours"],
        table,
        "Seconds are medians (rounds). Gaps are relative, |sum of contributions - total| / total. Theirs: float64 "
        "totals; z→u gives norms, no signed contributions; u→z gives dimensions after the first LayerNorm, ours heads. "
        "All blocks: the sum of their calls, one of ours.",
    )


if __name__ == "__main__":
    typer.run(main)
