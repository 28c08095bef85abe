"""Nodes spent and error reached by three rules on the same integrands: python benchmarks/accuracy.py.

Uniform trapezoids, plain Gauss-Legendre and our panels get the integrand of the engine, block by block, where
`quadrature.integrate` gets it. So they differ in where nodes go and when these are enough, and in nothing else.
"""

import contextlib
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from common import RESULTS, ROWS, attribute, environment, layer_numbers, names, numbers, show, token_ids, write_results
from torch import Tensor

import lig_lens
from lig_lens.integrate import integrand as engine_common
from lig_lens.integrate.quadrature import Integral, Integrand, integrate

# Nodes on each panel of the reference, and how far its panels go into the layers, in units of their widths.
REFERENCE_NODES = 16
INTO_LAYERS = 1 / 16


def main(
    models: Annotated[str, typer.Option(help="Names for load_model.")] = "minilm,smollm2",
    rows: Annotated[str, typer.Option(help="Maps and their baselines.")] = ",".join(ROWS),
    layers: Annotated[str | None, typer.Option(help="Block numbers; first, middle and last by default.")] = None,
    tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 32,
    sample: Annotated[int, typer.Option(help="Destinations to look at, evenly spread.")] = 8,
    steps: Annotated[str, typer.Option(help="Numbers of nodes of the fixed rules.")] = "8,32,128,512",
    tols: Annotated[str, typer.Option(help="Tolerances of ours.")] = "1e-2,1e-3,1e-4",
    dtype: Annotated[str, typer.Option(help="float64 keeps rounding out of it; float32 has it in.")] = "float64",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    text: Annotated[str | None, typer.Option(help="Prompt to cut to length; English prose by default.")] = None,
    out: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "accuracy.json",
) -> None:
    """Compare rules by the nodes that they spend on a cell and by the errors that they leave."""
    cells: list[dict[str, Any]] = []
    used: dict[str, list[int]] = {}
    allowed = [float(tol) for tol in names(tols)]
    where = sorted({round(position) for position in torch.linspace(0, tokens - 1, sample).tolist()})
    for name in names(models):
        model = lig_lens.load_model(name, device=device, dtype=dtype)
        ids = token_ids(model, tokens, text)
        n_layers = model.cfg.n_layers
        used[name] = sorted({0, n_layers // 2, n_layers - 1}) if layers is None else layer_numbers(layers, model)
        found = []
        for row in names(rows, ROWS):
            with _watching(_Rules(numbers(steps), allowed)) as rules:
                attribute(model, ids, row, layers=used[name], destinations=where, tol=min(allowed))
            found += [{"model": name, "row": row, **cell} for cell in rules.summary()]
        _show(f"{name}, blocks {', '.join(map(str, used[name]))}, {tokens} tokens, {dtype}", found)
        cells += found
    settings = {"tokens": tokens, "destinations": where, "layers": used, "dtype": dtype, "errors_are": "relative"}
    write_results(out, {"environment": environment(torch.device(device)), "settings": settings, "cells": cells})


@dataclass(frozen=True)
class _Truth:
    """What the cells of one block should give.

    `moving` [dst group] leaves out the cells that move by less than rounding: nothing relative can be said of them.
    `total` [cell] and `parts` [cell part] are those of the others.
    """

    moving: Tensor
    total: Tensor
    parts: Tensor

    def compare(self, parts: Tensor, nodes: Tensor) -> dict[str, Tensor]:
        """What the moving cells got, given all parts [dst group part] and nodes [dst group] of a rule."""
        found = parts.cpu().double()[self.moving]
        return {
            "nodes": nodes[self.moving].double(),
            "gap": (found.sum(-1) - self.total).abs() / self.total.abs(),
            "error": (found - self.parts).abs().amax(-1) / self.parts.abs().amax(-1),
        }


class _Rules:
    """All rules, tried on every integrand that comes by."""

    def __init__(self, steps: Sequence[int], tols: Sequence[float]) -> None:
        self.steps, self.tols = steps, tols
        self._left_out = 0
        self._found: dict[tuple[str, float], list[dict[str, Tensor]]] = {}

    def integrate(
        self,
        integrand: Integrand,
        s0: Tensor,
        s1: Tensor,
        noise: Tensor,
        *,
        tol: float,
        max_nodes: int,
        all_layers_known: bool = False,
    ) -> Integral:
        """Stand in for `quadrature.integrate`, whose arguments and result these are."""
        asked: dict[str, Any] = {"max_nodes": max_nodes, "all_layers_known": all_layers_known}
        ours = {t: integrate(integrand, s0, s1, noise, tol=t, **asked) for t in self.tols}
        total = ours[tol].total.cpu().double()
        moving = total.abs() > noise.cpu().double() / min(self.tols)
        self._left_out += int((~moving).sum())
        truth = _Truth(moving, total[moving], _fixed(integrand, *_reference(s0, s1))[moving])
        for name, rule in (("trapezoid", _trapezoid), ("Gauss-Legendre", _gauss_legendre)):
            for n in self.steps:
                self._keep(name, n, truth.compare(_fixed(integrand, *rule(n)), torch.full_like(total, n)))
        for t, integral in ours.items():
            says = {"estimate": integral.error.cpu().double()[moving], "converged": integral.converged.cpu()[moving]}
            self._keep("ours", t, {**truth.compare(integral.parts, integral.nodes), **says})
        return ours[tol]

    def _keep(self, name: str, setting: float, cells: dict[str, Tensor]) -> None:
        self._found.setdefault((name, setting), []).append(cells)

    def summary(self) -> list[dict[str, Any]]:
        """One record for each rule and number of nodes or tolerance, all blocks together."""
        result = []
        for (name, setting), pieces in self._found.items():
            cells = {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}
            if not len(cells["gap"]):
                raise SystemExit("None of the destinations moves: take more of them (--sample).")
            result.append(
                {
                    "rule": name,
                    "steps": None if name == "ours" else setting,
                    "tol": setting if name == "ours" else None,
                    "cells": len(cells["gap"]),
                    "cells_left_out": self._left_out,
                    "mean_nodes": float(cells["nodes"].mean()),
                    **{f"median_{key}": statistics.median(cells[key].tolist()) for key in ("gap", "error")},
                    **{f"worst_{key}": float(cells[key].max()) for key in ("gap", "error")},
                    **(_estimates(cells, setting) if name == "ours" else {}),
                }
            )
        return result


def _estimates(cells: dict[str, Tensor], tol: float) -> dict[str, Any]:
    """How the errors that ours estimates relate to the true ones, and how many it takes for small that are not."""
    error, converged = cells["error"], cells["converged"]
    times = cells["estimate"] / error.clamp(min=torch.finfo(torch.float64).eps)
    counts = error > tol / 10
    return {
        "converged": float(converged.double().mean()),
        "converged_but_error_above_tol": int((converged & (error > tol)).sum()),
        "converged_but_gap_above_tol": int((converged & (cells["gap"] > tol)).sum()),
        "median_estimate_over_error": statistics.median(times.tolist()),
        "cells_with_error_above_tenth_of_tol": int(counts.sum()),
        "least_estimate_over_error_there": float(times[counts].min()) if bool(counts.any()) else None,
    }


@contextlib.contextmanager
def _watching(rules: _Rules) -> Iterator[_Rules]:
    """Let engines hand their integrands to `rules`."""
    engine_common.integrate = rules.integrate
    try:
        yield rules
    finally:
        engine_common.integrate = integrate


def _fixed(integrand: Integrand, a: Tensor, weights: Tensor) -> Tensor:
    """Parts [dst group part] by a rule with nodes `a` and `weights` [node], the same for all destinations."""
    n_dst = integrand.n_dst
    everything = torch.ones(n_dst, integrand.n_groups, dtype=torch.bool)
    factors = weights[None, :, None].repeat(n_dst, 1, 1)
    return integrand.sums(torch.arange(n_dst), a.repeat(n_dst, 1), factors, everything)[0].cpu().double()


def _trapezoid(n: int) -> tuple[Tensor, Tensor]:
    """Evenly spaced nodes, both ends among them, where half of a weight goes."""
    weights = torch.full((n,), 1 / (n - 1), dtype=torch.float64)
    weights[[0, -1]] /= 2
    return torch.linspace(0, 1, n, dtype=torch.float64), weights


def _gauss_legendre(n: int) -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return torch.as_tensor(0.5 * (nodes + 1)), torch.as_tensor(0.5 * weights)


def _reference(s0: Tensor, s1: Tensor) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre on panels whose length halves towards both ends, until they are within the narrowest layer.

    It knows nothing of the variable that our panels are laid out in.
    """

    def breaks(width: Tensor) -> list[float]:
        halvings = math.ceil(math.log2(0.5 / (INTO_LAYERS * max(float(width.min()), 1e-18))))
        return [0.5**k for k in range(halvings + 1, 0, -1)]

    ends = torch.tensor([0.0, *breaks(s0), *(1 - x for x in reversed(breaks(s1)[:-1])), 1.0], dtype=torch.float64)
    nodes, weights = _gauss_legendre(REFERENCE_NODES)
    lengths = ends.diff()[:, None]
    return (ends[:-1, None] + lengths * nodes).flatten(), (lengths * weights).flatten()


def _show(title: str, cells: list[dict[str, Any]]) -> None:
    table, former = [], None
    for cell in cells:
        ours = cell["tol"] is not None
        missed = f"{cell['converged_but_error_above_tol']}/{cell['cells']}" if ours else ""
        least = cell["least_estimate_over_error_there"] if ours else None
        table.append(
            [
                cell["row"].replace(":", " ") if cell["row"] != former else "",
                f"ours, tol {cell['tol']:g}" if ours else f"{cell['rule']} {cell['steps']}",
                f"{cell['mean_nodes']:.3g}",
                *(f"{cell[key]:.1e}" for key in ("median_gap", "worst_gap", "median_error", "worst_error")),
                f"{cell['converged']:.1%}" if ours else "",
                missed,
                f"{cell['median_estimate_over_error']:.2g}" if ours else "",
                "" if least is None else f"{least:.2g}",
            ]
        )
        former = cell["row"]
    show(
        title,
        [
            *("map baseline", "rule", "nodes", "gap: median", "worst", "error: median", "worst"),
            *("converged", "but off", "est./true", "least"),
        ],
        table,
        "nodes: mean of the cells; ours also evaluates the scalar once at each end of a panel. gap: of the sum, "
        "relative to the cell's total. error: of the worst part, relative to the cell's largest. but off: cells that "
        "ours takes for converged although their error is above tol. est./true: estimated by true error, median; "
        "least: the smallest among cells with an error above tol / 10. Cells that move by less than rounding are left "
        "out.",
    )


if __name__ == "__main__":
    typer.run(main)
