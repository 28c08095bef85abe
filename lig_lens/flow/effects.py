"""Effects: what interventions do to a metric, or scores that claim to foretell it, with the labels of their axes."""

import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.arguments import checked
from lig_lens.errors import InputError, optional
from lig_lens.files import write_atomic
from lig_lens.names import head_name

if TYPE_CHECKING:
    import pandas

AXES = {
    "heads": ("layer", "head"),
    "heads_by_pos": ("layer", "head", "pos"),
    "positions": ("layer", "pos"),
    "edges": ("layer", "head", "src", "dst"),
}


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Effects:
    """A number for each head, position or edge of a prompt.

    Attributes:
        values: in units of the metric (scores may have others); NaN where nothing was measured.
        on: what the axes are, a key of `effects.AXES`: `heads` [layer, head], `heads_by_pos` [layer, head, pos],
            `positions` [layer, pos] or `edges` [layer, head, src, dst].
        name: what was done, such as "activation patching of hook_z".
        tokens: one string per position.
        layers: block numbers that the layer axis stands for.
        metric: name of the metric.
        measures: what a positive value means, such as "metric lost: clean - ablated"; `score` where nothing was done.
        reference: the metric without any intervention.
        settings: what else was asked for; JSON-able.

    Raises:
        InputError: a shape that does not belong to the labels.
    """

    values: Float[Tensor, "..."]
    on: str
    name: str
    tokens: tuple[str, ...]
    layers: tuple[int, ...]
    metric: str
    measures: str = "score"
    reference: float = float("nan")
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", self.values.detach().to("cpu", torch.float32))
        if self.on not in AXES:
            raise InputError(f"Effects on {self.on!r}: use one of {', '.join(AXES)}.")
        sizes = {"layer": len(self.layers)} | dict.fromkeys(("src", "dst", "pos"), len(self.tokens))
        axes, shape = AXES[self.on], tuple(self.values.shape)
        if len(shape) != len(axes) or any(sizes.get(a, n) != n for a, n in zip(axes, shape, strict=True)):
            raise InputError(
                f"Effects on {self.on} have shape {list(shape)}, expected {list(axes)} for {len(self.layers)} layers "
                f"and {len(self.tokens)} tokens."
            )

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of `values`."""
        return AXES[self.on]

    @checked
    def label(self, index: tuple[int, ...]) -> str:
        """One entry of `top` in words, such as `L9H6 at ' to' (14)` or `L3H0 ' Mary' (1) → ' to' (14)`.

        Raises:
            InputError: not one whole number for each axis, or a position that the prompt does not have.
        """
        ends = [len(self.tokens) if axis in ("pos", "src", "dst") else None for axis in self.axes]
        if len(index) != len(ends) or any(e is not None and not -e <= i < e for i, e in zip(index, ends, strict=True)):
            raise InputError(
                f"label: index={index}: give one number for each of {', '.join(self.axes)}, as top() does."
            )
        at = dict(zip(self.axes, index, strict=True))
        words = head_name(at["layer"], at.get("head"))
        if "pos" in at:
            words += f" at {self.tokens[at['pos']]!r} ({at['pos']})"
        if "src" in at:
            words += f" {self.tokens[at['src']]!r} ({at['src']}) → {self.tokens[at['dst']]!r} ({at['dst']})"
        return words

    @checked
    def top(self, k: int = 10) -> list[tuple[tuple[int, ...], float]]:
        """Find the k strongest by absolute value: (block number, then numbers along the other axes) and value."""
        if k < 1:
            raise InputError(f"top: k is {k}: ask for at least 1.")
        flat = self.values.flatten()
        size = torch.nan_to_num(flat.abs(), nan=-1.0)
        order = torch.sort(size, descending=True, stable=True).indices[:k]
        found = []
        for place in order[: int((size >= 0).sum())]:
            layer, *rest = (int(i) for i in torch.unravel_index(place, self.values.shape))
            found.append(((self.layers[layer], *rest), float(flat[place])))
        return found

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row for each entry that was measured: the axes (layers by number), tokens, and `effect`.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        places = (~self.values.isnan()).nonzero()
        columns: dict[str, list[object]] = {}
        for axis, numbers in zip(self.axes, places.T.tolist(), strict=True):
            columns[axis] = [self.layers[n] for n in numbers] if axis == "layer" else numbers
            if axis in ("pos", "src", "dst"):
                columns[f"{axis}_token"] = [self.tokens[n] for n in numbers]
        columns["effect"] = self.values[tuple(places.T)].tolist()
        frame: pandas.DataFrame = optional("pandas", "Effects.to_dataframe").DataFrame(columns)
        return frame

    @checked
    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """All labels and the measured entries as JSON; also written to `path`, if given.

        Raises:
            InputError: `path` cannot be written.
        """
        places = (~self.values.isnan()).nonzero()
        entries = [
            {"index": [self.layers[place[0]], *place[1:]], "value": float(f"{value:.9g}")}
            for place, value in zip(places.tolist(), self.values[tuple(places.T)].tolist(), strict=True)
        ]
        kept = ("on", "name", "tokens", "layers", "metric", "measures", "settings")
        labels = {name: getattr(self, name) for name in kept}
        reference = None if self.reference != self.reference else self.reference
        document = {"schema": "lig_lens.effects", "schema_version": 1, **labels, "reference": reference}
        document |= {"axes": self.axes, "shape": list(self.values.shape), "entries": entries}
        text = json.dumps(document, ensure_ascii=False, allow_nan=False)
        if path is not None:
            write_atomic(path, (text + "\n").encode())
        return text

    def __repr__(self) -> str:
        measured = int((~self.values.isnan()).sum())
        return f"Effects({self.name} on {self.on} {list(self.values.shape)}, {measured} measured, {self.metric})"
