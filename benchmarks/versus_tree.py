"""One tree against another, such as a worktree of an older commit: python benchmarks/versus_tree.py PATH.

Each tree has a process of its own, with the models loaded; both are asked for the same attribution in turn (A, B, A,
B, ...), so that a slow spell of the machine hits both.
"""

import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from common import RESULTS, ROWS, environment, names, numbers, show, write_results

HERE = Path(__file__).resolve().parents[1]


def main(
    other: Annotated[Path, typer.Argument(help="Folder of the other tree.")] = HERE,
    models: Annotated[str, typer.Option(help="Names for load_model.")] = "minilm,smollm2",
    lengths: Annotated[str, typer.Option(help="Numbers of tokens.")] = "15,64",
    rows: Annotated[str, typer.Option(help="Maps and their baselines.")] = ",".join(ROWS),
    repeats: Annotated[int, typer.Option(help="Timed runs of a cell and side.")] = 5,
    out: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "versus_tree.json",
    child: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Time every map and baseline in both trees; a prompt that the model has not seen is the second of its length."""
    if child:
        return _serve()
    cells: list[dict[str, Any]] = []
    sides = {"other": _Tree(other.resolve()), "this": _Tree(HERE)}
    for name in names(models):
        for length in numbers(lengths):
            for row in names(rows, ROWS):
                seconds: dict[str, list[float]] = {side: [] for side in sides}
                peaks = {}
                for number in range(repeats + 1):
                    for side, tree in sides.items():
                        answer = tree.ask(model=name, length=length, row=row, prompt=number)
                        if number:  # the first run warms up, and finds the blocks
                            seconds[side].append(answer["seconds"])
                        peaks[side] = answer["peak_mib"]
                medians = {side: statistics.median(found) for side, found in seconds.items()}
                ratios = [a / b for a, b in zip(seconds["other"], seconds["this"], strict=True)]
                cells.append(
                    {
                        "model": name,
                        "tokens": length,
                        "row": row,
                        "ms": {side: 1e3 * median for side, median in medians.items()},
                        "ratio": medians["other"] / medians["this"],
                        "ratios": ratios,
                        "peak_mib": peaks,
                    }
                )
    for tree in sides.values():
        tree.close()
    show(
        f"{other} against {HERE.name}: ms, medians of {repeats}",
        ["model, tokens, map", "other", "this", "other / this", "min", "max", "peak MiB other", "this"],
        [
            [
                f"{cell['model']} {cell['tokens']} {cell['row'].replace(':', ' ')}",
                *(f"{cell['ms'][side]:.0f}" for side in sides),
                f"{cell['ratio']:.2f}",
                f"{min(cell['ratios']):.2f}",
                f"{max(cell['ratios']):.2f}",
                *("-" if cell["peak_mib"][side] is None else f"{cell['peak_mib'][side]:.0f}" for side in sides),
            ]
            for cell in cells
        ],
        "Above 1 this tree is faster. Every run has a new prompt. Peaks: resident memory of the last run above before.",
    )
    settings = {"other": str(other), "models": models, "lengths": lengths, "rows": rows, "repeats": repeats}
    write_results(out, {"environment": environment(), "settings": settings, "cells": cells})


class _Tree:
    """A process that runs attributions with the package of one tree."""

    def __init__(self, tree: Path) -> None:
        paths = [str(tree), str(HERE / "benchmarks")]
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tree,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )

    def ask(self, **asked: Any) -> dict[str, Any]:
        """Run one attribution."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise SystemExit("The other process has no pipes.")
        stdin.write(json.dumps(asked) + "\n")
        stdin.flush()
        while line := stdout.readline():
            if line.startswith("{"):  # loaders print, too
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit(f"The process of one tree ended: {self._process.wait()}.")

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


def _serve() -> None:
    """Answer attributions, one a line, with the package that is found first."""
    import torch
    from timing import peak_memory

    import lig_lens

    warnings.simplefilter("ignore")
    models: dict[str, Any] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["model"] not in models:
            models[asked["model"]] = lig_lens.load_model(asked["model"])
        model, (name, baseline) = models[asked["model"]], asked["row"].split(":")
        draw = torch.Generator().manual_seed(asked["prompt"])
        ids = torch.randint(1000, 20000, (asked["length"],), generator=draw)

        def run(model: Any = model, ids: Any = ids, name: str = name, baseline: str = baseline) -> float:
            start = time.perf_counter()
            lig_lens.attribute(model, ids, maps=(name,), progress=False, **{f"{name}_baseline": baseline})
            return time.perf_counter() - start

        seconds, peaks = peak_memory(run, torch.device("cpu"))
        print(json.dumps({"seconds": seconds, "peak_mib": peaks["resident_peak_mib"]}), flush=True)


if __name__ == "__main__":
    typer.run(main)
