"""The released package's side of versus_released_lig.py, run by the Python of its own virtual environment.

It answers one JSON line on stdout for each JSON line on stdin: `explain` runs the package's public
`lig.explain`, with the model's loading taken out, and `gaps` says how far the last result is from adding up,
with the totals computed here in float64.
"""

import copy
import json
import os
import statistics
import sys
from typing import Any

import torch
from hf_blocks import HfBlock, moved, start_of_path

# Baselines have other names there. `att_itb_a0` is the same.
NAMES = {"itb": "self_input_token"}
# Cells that move by less than this share of the most moving one have no relative gap.
VANISHING = 1e-4


class Package:
    """The installed package with one model."""

    def __init__(self, folder: str, threads: int) -> None:
        torch.set_num_threads(threads)
        import lig
        import transformers
        from lig.adapters.encoder import EncoderAdapter

        self._explain, self._folder = lig.explain, folder
        self._adapter = EncoderAdapter.from_pretrained(folder, device="cpu")
        EncoderAdapter.from_pretrained = lambda *args, **kwargs: self._adapter
        self._exact = copy.deepcopy(self._adapter.model).double()
        self._last: tuple[dict[str, Any], dict[str, Any]] = {}, {}
        self.versions = {"torch": torch.__version__, "transformers": transformers.__version__}

    def explain(self, text: str, granularity: str, layer: int, baseline: str) -> dict[str, Any]:
        """Run the package on one block; give the tokens that it saw."""
        result = self._explain(
            text,
            model=self._folder,
            granularity=granularity,
            layers=[layer],
            device="cpu",
            **{f"baseline_{granularity}": NAMES.get(baseline, baseline)},
        )
        self._last = {"text": text, "granularity": granularity, "layer": layer, "baseline": baseline}, result
        return {"tokens": result["tokens"]}

    def gaps(self) -> dict[str, float]:
        """How far the sums of the last result's columns are from what they should explain, relatively."""
        asked, result = self._last
        ids = torch.tensor(self._adapter.tokenizer(asked["text"])["input_ids"])
        block = HfBlock(self._exact, ids, asked["layer"])
        computed = result["layers"][str(asked["layer"])]
        sums, totals, largest = [], [], 0.0
        for destination in range(len(ids)):
            columns = _columns(computed, asked["granularity"], destination)
            sums += [sum(column) for column in columns]
            totals += self._totals(block, asked, destination)
            largest = max(largest, *(abs(value) for column in columns for value in column))
        least = VANISHING * max(totals)
        gaps = [abs(s - total) / total for s, total in zip(sums, totals, strict=True) if total > least]
        return {
            "worst_gap": max(gaps),
            "median_gap": statistics.median(gaps),
            "cells": len(gaps),
            "largest_contribution": largest,
        }

    def _totals(self, block: HfBlock, asked: dict[str, Any], destination: int) -> list[float]:
        """How far the block's output at one destination moves between baseline and prompt; one per head for att."""
        layer = self._exact.encoder.layer[asked["layer"]]
        resid = block.resid_pre
        if asked["granularity"] == "mlp":  # from what enters the MLP, after the first LayerNorm
            start = start_of_path("itb", resid, destination)
            reached, at_start = (layer.attention(values[None])[0] for values in (resid, start))
            first = torch.zeros_like(reached) if asked["baseline"] == "zero" else at_start
            scalar = moved(lambda values: layer.output(layer.intermediate(values), values), first[0], destination)
            return [float(scalar(reached)[0])]
        run = block.heads if asked["granularity"] == "att" else block.resid_post
        scalar = moved(run, start_of_path(asked["baseline"], resid, destination), destination)
        return [float(value) for value in scalar(resid[None]).flatten()]


def _columns(computed: dict[str, Any], granularity: str, destination: int) -> list[list[float]]:
    """What the package says contributed to one destination: one list, or one per head."""
    if granularity == "layer":
        return [[row[destination] for row in computed["z2z"]["matrix"]]]
    target = computed["targets"][str(destination)]
    if granularity == "mlp":
        return [target["u2z"]["contributions"]]
    return [head["contributions"] for head in target["z2u"]["heads"].values()]


def main() -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the package prints is no answer
    package = Package(sys.argv[1], int(sys.argv[2]))
    _answer(answers, {"versions": package.versions})
    for line in sys.stdin:
        request = json.loads(line)
        with torch.set_grad_enabled(request["do"] == "explain"):
            _answer(answers, getattr(package, request.pop("do"))(**request))


def _answer(answers: Any, content: dict[str, Any]) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
