"""The result: how faithful methods are, by measure and replacer, with intervals over inputs."""

import functools
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lig_lens.arguments import checked
from lig_lens.errors import InputError, check_choice, optional
from lig_lens.files import write_atomic
from lig_lens.relevance.faithfulness.numbers import intervals

if TYPE_CHECKING:
    import pandas

SCHEMA = 1
_ALONG = ("fractions", "mean", "low", "high")
_ARROWS = {"higher": "↑", "lower": "↓"}


@dataclass(frozen=True)
class Row:
    """One method's values of one measure.

    Attributes:
        method: its label.
        replacer: what removed positions were replaced by; None where none are removed.
        measure: its label.
        better: whether `higher` or `lower` values are.
        values: of each input; NaN where it says nothing.
    """

    method: str
    replacer: str | None
    measure: str
    better: str
    values: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True)
class Entry:
    """A mean over inputs with its interval, or a mean difference.

    Attributes:
        mean: over the inputs that say something.
        low: lower end of the bootstrap interval.
        high: upper end.
        n: how many inputs say something.
    """

    method: str
    replacer: str | None
    measure: str
    better: str
    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Curve:
    """Mean probability of the class without, or with nothing but, the most relevant positions.

    Attributes:
        method: its label.
        replacer: what removed positions were replaced by.
        kind: `removed` or `kept`.
        fractions: shares of the positions, from 0 to 1.
        mean: over inputs.
        low: lower ends of the bootstrap intervals.
        high: upper ends.
    """

    method: str
    replacer: str
    kind: str
    fractions: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True, eq=False, repr=False)
class League:
    """How faithful methods are to a model, on some inputs.

    Attributes:
        rows: values of each method, replacer and measure.
        curves: of deletion and insertion.
        inputs: what the inputs are, in a few words.
        left_out: methods, replacers and measures that could not be had, and why.
        model_name: what the model is called.
        seed: of the bootstrap.
        settings: what was asked; JSON-able.
    """

    rows: tuple[Row, ...]
    curves: tuple[Curve, ...] = ()
    inputs: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    model_name: str = ""
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def methods(self) -> tuple[str, ...]:
        """Labels of the methods."""
        return tuple(dict.fromkeys(row.method for row in self.rows))

    @property
    def measures(self) -> tuple[str, ...]:
        """Labels of the measures."""
        return tuple(dict.fromkeys(row.measure for row in self.rows))

    @property
    def replacers(self) -> tuple[str, ...]:
        """Names of the replacers."""
        return tuple(dict.fromkeys(row.replacer for row in self.rows if row.replacer is not None))

    @functools.cached_property
    def table(self) -> tuple[Entry, ...]:
        """Mean of each row with its 95 % bootstrap percentile interval; all rows see the same draws of inputs."""
        return self._entries(self.rows)

    @checked
    def versus(self, method: str) -> tuple[Entry, ...]:
        """What a method has more than each of the others, input by input, with intervals of the mean difference.

        Where `better` is `higher`, an interval above 0 says that the method named here is better than the entry's.

        Raises:
            InputError: no such method.
        """
        check_choice("method", method, self.methods)
        own = {(row.replacer, row.measure): row.values for row in self.rows if row.method == method}
        differences = [
            Row(row.method, row.replacer, row.measure, row.better, _minus(own[row.replacer, row.measure], row.values))
            for row in self.rows
            if row.method != method and (row.replacer, row.measure) in own
        ]
        return self._entries(differences)

    def _entries(self, rows: Sequence[Row]) -> tuple[Entry, ...]:
        if not rows:
            return ()
        values = np.array([row.values for row in rows], dtype=np.float64)
        counts = (~np.isnan(values)).sum(1).tolist()
        mean, low, high = intervals(values, self.seed)
        return tuple(
            Entry(
                row.method, row.replacer, row.measure, row.better,
                float(mean[at]), float(low[at]), float(high[at]), counts[at],
            )
            for at, row in enumerate(rows)
        )  # fmt: skip

    @checked
    def to_dataframe(self, versus: str | None = None) -> "pandas.DataFrame":
        """Long form, one row per method, replacer and measure: `table`, or the differences of `versus`.

        Raises:
            InputError: no such method.
            MissingPackageError: pandas is not installed.
        """
        entries = self.table if versus is None else self.versus(versus)
        frame: pandas.DataFrame = optional("pandas", "League.to_dataframe").DataFrame(
            [asdict(entry) for entry in entries], columns=list(Entry.__dataclass_fields__)
        )
        return frame

    @checked
    def to_markdown(self, versus: str | None = None) -> str:
        """Tables for each replacer, methods by measures; the best mean of a column is bold, arrows say what is better.

        Args:
            versus: of a method, for differences from it in place of means.

        Raises:
            InputError: no such method.
        """
        entries = self.table if versus is None else self.versus(versus)
        of = f"{versus} minus each method" if versus else "Means"
        n = len(self.inputs)
        parts = [
            f"{of} over {n} inputs of {self.model_name or 'the model'}, with bootstrap 95 % intervals; ↑ higher is "
            "better, ↓ lower."
        ]
        for replacer in (*self.replacers, None):
            some = [entry for entry in entries if entry.replacer == replacer]
            if some:
                title = "No positions removed" if replacer is None else f"Removed positions: {replacer}"
                parts += [f"### {title}", _markdown(some, n, bold=versus is None)]
        if self.left_out:
            parts += ["### Left out", "\n".join(f"- {name}: {why}" for name, why in self.left_out.items())]
        return "\n\n".join(parts) + "\n"

    @checked
    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """JSON text, also written to `path` if that is given; values by input are in it, missing ones as null.

        Raises:
            InputError: `path` cannot be written.
            OutputError: writing failed.
        """
        rows = [{**asdict(row), **_ends(entry)} for row, entry in zip(self.rows, self.table, strict=True)]
        document = {
            "kind": "lig_lens.league",
            "schema": SCHEMA,
            "model": self.model_name,
            "seed": self.seed,
            "inputs": list(self.inputs),
            "left_out": self.left_out,
            "settings": self.settings,
            "rows": rows,
            "curves": [asdict(curve) for curve in self.curves],
        }
        text = json.dumps(_finite(document), ensure_ascii=False, allow_nan=False) + "\n"
        if path is not None:
            write_atomic(path, text.encode())
        return text

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "League":
        """Read what `to_json` wrote.

        Raises:
            InputError: no such file, or not a league's.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            if document["kind"] != "lig_lens.league" or document["schema"] != SCHEMA:
                raise InputError(f"schema {document['schema']!r} of {document['kind']!r}; this version reads {SCHEMA}")
            return cls(
                rows=tuple(
                    Row(
                        **{name: row[name] for name in ("method", "replacer", "measure", "better")},
                        values=_numbers(row["values"]),
                    )
                    for row in document["rows"]
                ),
                curves=tuple(
                    Curve(
                        curve["method"], curve["replacer"], curve["kind"], *(_numbers(curve[name]) for name in _ALONG)
                    )
                    for curve in document["curves"]
                ),
                inputs=tuple(document["inputs"]),
                left_out=document["left_out"],
                model_name=document["model"],
                seed=document["seed"],
                settings=document["settings"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"Cannot read a league from {os.fspath(path)!r}: {error}. Save it again.") from error

    def __repr__(self) -> str:
        return (
            f"League({len(self.methods)} methods, {len(self.replacers)} replacers, {len(self.measures)} measures, "
            f"{len(self.inputs)} inputs of {self.model_name or 'a model'}; {len(self.left_out)} left out)"
        )


def _minus(a: Iterable[float], b: Iterable[float]) -> tuple[float, ...]:
    return tuple(one - other for one, other in zip(a, b, strict=True))


def _markdown(entries: Sequence[Entry], n: int, bold: bool) -> str:
    measures = list(dict.fromkeys((one.measure, one.better) for one in entries))
    cells = {(one.method, one.measure): one for one in entries}
    best = {}
    for measure, better in measures:
        means = [one.mean for one in entries if one.measure == measure and not math.isnan(one.mean)]
        if means and bold:
            best[measure] = max(means) if better == "higher" else min(means)
    counts = {m: max(one.n for one in entries if one.measure == m) for m, _ in measures}
    titles = [f"{m} {_ARROWS[better]}" + (f" (n = {counts[m]})" if counts[m] != n else "") for m, better in measures]
    lines = [f"| method | {' | '.join(titles)} |", f"|---|{'---|' * len(measures)}"]
    for method in dict.fromkeys(one.method for one in entries):
        shown = []
        for measure, _ in measures:
            one = cells.get((method, measure))
            if one is None or math.isnan(one.mean):
                shown.append("-")
                continue
            mean = f"**{one.mean:.3f}**" if best.get(measure) == one.mean else f"{one.mean:.3f}"
            shown.append(f"{mean} [{one.low:.3f}, {one.high:.3f}]")
        lines.append(f"| {method} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _ends(entry: Entry) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in ("mean", "low", "high", "n")}


def _finite(value: Any) -> Any:
    """The same for JSON, which has no NaN."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _numbers(values: Sequence[float | None]) -> tuple[float, ...]:
    return tuple(map(_number, values))
