"""Token relevance of every block against captum's LayerIntegratedGradients: python benchmarks/classes.py."""

import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import RESULTS, environment, hf_model, names, numbers, show, token_ids, write_results
from timing import Side, alternate, peak_memory

import lig_lens

FIRST_STEPS = 4


def main(
    model: Annotated[str, typer.Option(help="A classifier of texts, of BERT's family.")] = "sentiment",
    lengths: Annotated[str, typer.Option(help="Numbers of tokens.")] = "16,64",
    target: Annotated[int, typer.Option(help="Class whose logit is explained.")] = 1,
    tol: Annotated[float, typer.Option(help="Largest completeness gap, relative.")] = 1e-3,
    max_steps: Annotated[int, typer.Option(help="Most steps that captum is given.")] = 512,
    repeats: Annotated[int, typer.Option(help="Timed rounds.")] = 5,
    rows: Annotated[str, typer.Option(help="ca_lig, ig_layers.")] = "ca_lig",
    text: Annotated[str | None, typer.Option(help="Prompt to cut to length; English prose by default.")] = None,
    out: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "classes.json",
) -> None:
    """All boundaries of a classifier, at the same gap: CA-LIG, captum with the steps it needs, and a forward pass."""
    hooked = lig_lens.load_model(model)
    plain = hf_model(hooked)
    for weight in plain.parameters():
        weight.requires_grad_(False)
    cells = [
        {
            "tokens": length,
            "row": row,
            **_cell(hooked, plain, row, token_ids(hooked, length, text), target, tol, max_steps, repeats),
        }
        for length in numbers(lengths)
        for row in names(rows)
    ]
    show(
        f"All boundaries at a gap of {tol:g}; times in forward passes of the plain model",
        [
            "tokens",
            "method",
            "forward, ms",
            "ours",
            "gap",
            "captum",
            "gap",
            "captum, searched",
            "captum / ours",
            "peak, MiB",
        ],
        [
            [
                str(cell["tokens"]),
                cell["row"],
                f"{cell['forward']['ms']:.1f}",
                f"{cell['ours_in_passes']:.0f}",
                f"{cell['ours_gap']:.1e}",
                f"{cell['captum_in_passes']:.0f} (steps {', '.join(map(str, cell['steps']))})",
                f"{cell['captum_gap']:.1e}",
                f"{cell['captum_searched_in_passes']:.0f}",
                f"{cell['captum_over_ours']:.2f}, searched {cell['captum_searched_over_ours']:.2f}",
                " / ".join("?" if peak is None else f"{peak:.0f}" for peak in cell["peak_mib"].values()),
            ]
            for cell in cells
        ],
    )
    write_results(out, {"environment": environment(torch.device("cpu")), "settings": {"tol": tol}, "cells": cells})


class _Captum:
    """Captum at the boundaries of a plain BERT classifier."""

    def __init__(self, plain: Any, ids: torch.Tensor, reference: torch.Tensor, target: int) -> None:
        from captum.attr import LayerIntegratedGradients

        self.ids, self.reference, self.target = ids[None], reference[None], target
        body = plain.base_model
        modules = [body.embeddings, *body.encoder.layer]
        run = lambda ids: plain(ids).logits  # noqa: E731
        self.at = [LayerIntegratedGradients(run, module) for module in modules]
        with torch.no_grad():
            self.total = float((run(self.ids) - run(self.reference))[0, target])

    def gap(self, boundary: int, steps: int) -> float:
        """Attribute at one boundary; the relative gap."""
        _, delta = self.at[boundary].attribute(
            self.ids,
            baselines=self.reference,
            target=self.target,
            n_steps=steps,
            method="gausslegendre",
            return_convergence_delta=True,
        )
        return abs(float(delta)) / abs(self.total)

    def search(self, tol: float, max_steps: int) -> tuple[list[int], float]:
        """Double the steps at each boundary until the gap is within `tol`."""
        steps, worst = [], 0.0
        for boundary in range(len(self.at)):
            count = FIRST_STEPS
            while (gap := self.gap(boundary, count)) > tol and count < max_steps:
                count *= 2
            steps.append(count)
            worst = max(worst, gap)
        return steps, worst


def _cell(
    hooked: Any, plain: Any, row: str, ids: torch.Tensor, target: int, tol: float, max_steps: int, repeats: int
) -> dict[str, Any]:
    options = {"target": target, "method": row, "tol": tol, "progress": False}
    first = lig_lens.explain_class(hooked, ids, **options)
    reference = torch.tensor(first.settings["corrupted_token_ids"])
    captum = _Captum(plain, ids, reference, target)
    steps, gap = captum.search(tol, max_steps)

    def forward() -> Any:
        with torch.no_grad():
            return plain(ids[None])

    sides = {
        "forward": Side(forward, per_round=5),
        "ours": Side(lambda: lig_lens.explain_class(hooked, ids, **options)),
        "captum": Side(lambda: [captum.gap(boundary, count) for boundary, count in enumerate(steps)]),
        "searched": Side(lambda: captum.search(tol, max_steps)),
    }
    forward()
    peaks = {
        name: peak_memory(sides[name].run, torch.device("cpu"))[1]["resident_peak_mib"] for name in ("ours", "captum")
    }
    alternate(list(sides.values()), repeats, torch.device("cpu"))
    pairs = {
        name: statistics.median(
            one / ours for one, ours in zip(sides[name].seconds, sides["ours"].seconds, strict=True)
        )
        for name in ("captum", "searched")
    }
    passes = {name: side.median / sides["forward"].median for name, side in sides.items()}
    return {
        **{name: side.record() for name, side in sides.items()},
        "ours_gap": first.worst_gap(),
        "ours_total": first.value - (first.reference or 0.0),
        "captum_total": captum.total,
        "captum_gap": gap,
        "steps": steps,
        "peak_mib": peaks,
        "ours_in_passes": passes["ours"],
        "captum_in_passes": passes["captum"],
        "captum_searched_in_passes": passes["searched"],
        "captum_over_ours": pairs["captum"],
        "captum_searched_over_ours": pairs["searched"],
    }


if __name__ == "__main__":
    typer.run(main)
