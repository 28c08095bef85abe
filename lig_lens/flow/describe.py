"""What there is to say of a Flow, as facts; tables, figures and the explorer make their sentences of them."""

from collections.abc import Mapping
from dataclasses import dataclass

from lig_lens.flow.data import FlowData


@dataclass(frozen=True)
class Facts:
    """Facts about a Flow.

    Attributes:
        model: name of the model.
        n_tokens: of the prompt.
        n_layers: of the layer axis.
        n_destinations: of the dst axis.
        averaged: over how many prompts `average` has gone, or None.
        maps: that the Flow has.
        baselines: where the paths of each map start, as far as the Flow knows.
        target: as it was asked for, or None where the Flow does not know.
        metric: name of the metric that is the target, or None.
        change: value of the metric on the corrupted and on the clean prompt, where the Flow knows both.
        by_message: contributions to the metric are split by message.
        hold: what stays while a path to the metric runs: `skip`, `others` or None.
        noising: it stays as in the clean run.
        tol: the tolerance, where the Flow knows it.
        gaps: the worst completeness gap of each map.
        counted: what the gaps are those of, `columns`, `layers` or `heads`.
        cells: how many of them there are, over all maps.
        missed: how many of them have not converged.
    """

    model: str
    n_tokens: int
    n_layers: int
    n_destinations: int
    averaged: int | None
    maps: tuple[str, ...]
    baselines: Mapping[str, str]
    target: str | None
    metric: str | None
    change: tuple[float, float] | None
    by_message: bool
    hold: str | None
    noising: bool
    tol: float | None
    gaps: Mapping[str, float]
    counted: str
    cells: int
    missed: int

    @property
    def worst_gap(self) -> float:
        """The largest gap of all maps."""
        return max(self.gaps.values())

    @property
    def converged_share(self) -> float:
        """Share of all cells that have converged."""
        return (self.cells - self.missed) / self.cells


def describe(flow: FlowData) -> Facts:
    """Read the facts off a Flow and off what it was asked for."""
    asked, masks = flow.settings, [flow.converged[name] for name in flow.maps]
    baselines = {name: asked.get(f"{name}_baseline") for name in flow.maps}
    tol, target = asked.get("tol"), asked.get("target")
    return Facts(
        model=flow.model_name,
        n_tokens=len(flow.tokens),
        n_layers=len(flow.layers),
        n_destinations=len(flow.destinations),
        averaged=averaged(asked),
        maps=flow.maps,
        baselines={name: str(baseline) for name, baseline in baselines.items() if baseline},
        target=None if target is None else str(target),
        metric=flow.metric,
        change=_change(asked.get("metric")),
        by_message=asked.get("split") == "message",
        hold=asked.get("hold"),
        noising=bool(asked.get("noising")),
        tol=tol if isinstance(tol, float) else None,
        gaps={name: flow.worst_gap(name) for name in flow.maps},
        counted=flow.axes.counted,
        cells=sum(mask.numel() for mask in masks),
        missed=sum(int((~mask).sum()) for mask in masks),
    )


def averaged(settings: Mapping[str, object]) -> int | None:
    """Over how many prompts `average` has gone to make a result with these settings, or None."""
    count = settings.get("averaged")
    return count if isinstance(count, int) else None


def _change(ends: object) -> tuple[float, float] | None:
    """Values of the metric on both prompts, from what the settings say of it."""
    if not isinstance(ends, dict):
        return None
    corrupted, clean = ends.get("corrupted"), ends.get("clean")
    return (corrupted, clean) if isinstance(corrupted, float) and isinstance(clean, float) else None
