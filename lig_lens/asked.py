"""What is asked of `attribute`, checked before any work starts."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lig_lens.errors import InputError, check_choice
from lig_lens.integrate.quadrature import NODES_PER_PANEL
from lig_lens.names import ENGINES, MAPS, SPLITS
from lig_lens.paths import BASELINES, baselines_of
from lig_lens.targets.metrics import Metric


@dataclass(frozen=True)
class Settings:
    """What was asked for, checked as far as it can be without a prompt."""

    maps: tuple[str, ...]
    baselines: dict[str, Any]
    target: Any
    tol: float
    max_nodes: int
    max_batch_tokens: int
    engine: str
    progress: bool
    split: str

    def __post_init__(self) -> None:
        if not self.maps:
            raise InputError("maps is empty: name at least one of 'attn', 'mlp', 'block'.")
        for name in self.maps:
            check_choice("map", name, MAPS)
        for name, baseline in self.baselines.items():  # a slip is a slip, also where the map is not asked for
            if not isinstance(baseline, Tensor):
                check_choice(f"{name}_baseline", baseline, baselines_of(name))
        check_choice("engine", self.engine, ENGINES)
        check_choice("split", self.split, SPLITS)
        if isinstance(self.target, Metric):
            self._check_metric(self.target)
        elif self.split != "source":
            raise InputError(
                f"split={self.split!r} goes with a metric as target: contributions to a head's output are those of "
                "sources (split='source')."
            )
        if not isinstance(self.tol, float) or not 0 < self.tol < 1:
            raise InputError(f"tol={self.tol!r} is not between 0 and 1: it is a relative gap, such as 1e-3.")
        if self.max_nodes < NODES_PER_PANEL:
            raise InputError(f"max_nodes={self.max_nodes} is too few: give at least {NODES_PER_PANEL}.")
        if self.max_batch_tokens < 1:
            raise InputError(f"max_batch_tokens={self.max_batch_tokens} is too few: give at least 1.")

    @property
    def per_metric(self) -> bool:
        """Whether the target is a metric of the logits."""
        return isinstance(self.target, Metric)

    def _check_metric(self, metric: Metric) -> None:
        if self.maps != ("attn",):
            raise InputError(
                f"maps={self.maps}: contributions to a metric ({metric.name}) are an attn map, and what bypasses the "
                "heads comes with it: use maps='attn', or leave maps out."
            )
        baseline = self.baselines["attn"]
        if isinstance(baseline, str) and not BASELINES.entry(baseline).shared:
            raise InputError(
                f"attn_baseline={baseline!r} has a path for each destination, and a metric ({metric.name}) is one "
                "number for all of them: use 'corrupted' with a second prompt, 'zero' or a tensor."
            )

    def baseline_of(self, name: str) -> Any:
        """What a map starts from."""
        return self.baselines[name]
