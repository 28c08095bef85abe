"""What is asked of `attribute`, checked before any work starts."""

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lig_lens.errors import InputError, check_choice
from lig_lens.inputs.prompts import Prompt, check_same_length, is_batch, read_prompt
from lig_lens.integrate.quadrature import NODES_PER_PANEL
from lig_lens.names import ENGINES, MAPS, SPLITS
from lig_lens.paths import BASELINES, baselines_of
from lig_lens.targets.metrics import Metric
from lig_lens.targets.targets import Direction

Selection = Any
"""Layers or destinations: one number, several (list, array, tensor), or None for all; checked in `chosen_numbers`."""


@dataclass(frozen=True)
class Settings:
    """What was asked for, checked as far as it can be without a prompt."""

    maps: tuple[str, ...]
    baselines: dict[str, Any]
    target: "str | Direction | Metric"
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

    @property
    def destination_target(self) -> "str | Direction":
        """The target, where it is one of each destination's vector."""
        assert not isinstance(self.target, Metric)
        return self.target

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

    def starts_from(self, name: str, baseline: str) -> bool:
        """Whether map `name` has the named baseline; tensors have no name."""
        return isinstance(self.baselines[name], str) and self.baselines[name] == baseline


def read_prompts(
    model: Any, prompt: Any, corrupted: Any, attention_mask: Any, prepend_bos: bool | None
) -> list[tuple[Prompt, Prompt | None]]:
    """Clean and corrupted prompt of every run."""
    several = is_batch(prompt)
    prompts, others, masks = (
        _one_each(several, prompt, prompt),
        _one_each(several, prompt, corrupted, "corrupted"),
        _one_each(several, prompt, attention_mask, "attention_mask"),
    )
    read: list[tuple[Prompt, Prompt | None]] = []
    for number, (one, other, mask) in enumerate(zip(prompts, others, masks, strict=True)):
        try:
            clean = read_prompt(model, one, prepend_bos=prepend_bos, attention_mask=mask)
            second = None
            if other is not None:
                second = read_prompt(model, other, prepend_bos=prepend_bos, what="corrupted prompt")
                check_same_length(clean, second)
        except InputError as error:
            where = f"Prompt {number} of {len(prompts)}: " if several else ""
            raise InputError(f"{where}{error}") from error
        read.append((clean, second))
    return read


def _one_each(several: bool, prompt: Any, value: Any, what: str = "prompt") -> list[Any]:
    """`value` as a list with one entry per prompt."""
    if not several:
        return [value]
    if value is None:
        return [None] * len(prompt)
    if isinstance(value, str) or len(value) != len(prompt):
        given = "one text" if isinstance(value, str) else f"{len(value)} entries"
        raise InputError(f"{what} has {given} for {len(prompt)} prompts: give a list with one per prompt.")
    return list(value)


def chosen_numbers(what: str, values: Selection, count: int) -> tuple[int, ...]:
    """Indices in `values`, made non-negative; all of `count` for None."""
    if values is None:
        return tuple(range(count))
    try:
        several = [values] if isinstance(values, (int, np.integer)) else list(values)
        chosen = [operator.index(v) for v in several]
    except TypeError as error:
        raise InputError(f"{what}s={values!r} is not a number or a list of numbers such as [0, 3].") from error
    if not chosen:
        raise InputError(f"{what}s is empty: name at least one, or leave it out for all {count}.")
    outside = [v for v in chosen if not -count <= v < count]
    if outside:
        raise InputError(
            f"{what} {outside[0]} is out of range: this {'model' if what == 'layer' else 'prompt'} has {count}, "
            f"numbered 0 to {count - 1}."
        )
    return tuple(dict.fromkeys(v % count for v in chosen))
