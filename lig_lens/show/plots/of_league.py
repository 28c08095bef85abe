"""What the figures of faithfulness show of a League."""

import math
from collections.abc import Sequence

from lig_lens.errors import InputError, check_choice
from lig_lens.relevance.faithfulness.league import League

Scores = dict[str, tuple[float, float, float]]


def curves_of(league: League, replacer: str | None, kind: str) -> dict[str, list[tuple[float, ...]]]:
    """Fractions, means and the ends of intervals, by method.

    Raises:
        InputError: a replacer that there is not, none where there are several, or no curve of that kind.
    """
    replacer = _replacer("deletion_curves", league, replacer)
    found = {
        one.method: [one.fractions, one.mean, one.low, one.high]
        for one in league.curves
        if (one.replacer, one.kind) == (replacer, kind)
    }
    if not found:
        raise InputError("deletion_curves: the League has no curve: measure deletion, insertion or between.")
    return found


class Standing:
    """Means and intervals of a League with one replacer.

    Attributes:
        scores: by measure and method; what no input says anything of is left out.
        better: by measure, `higher` or `lower`.
    """

    def __init__(self, league: League, replacer: str | None, measures: Sequence[str] | None) -> None:
        self._league = league
        self._replacers = (_replacer("league", league, replacer), None)
        for measure in measures or ():
            check_choice("measure", measure, league.measures)
        self.scores: dict[str, Scores] = {measure: {} for measure in measures or ()}
        self.better: dict[str, str] = {}
        for entry in league.table:
            asked = entry.replacer in self._replacers and (measures is None or entry.measure in measures)
            if asked and math.isfinite(entry.mean):
                self.scores.setdefault(entry.measure, {})[entry.method] = (entry.mean, entry.low, entry.high)
                self.better[entry.measure] = entry.better

    def near(self, measure: str, best: str) -> list[str]:
        """Methods that the best one is not better than for sure, by the differences input by input."""
        return [
            entry.method
            for entry in self._league.versus(best)
            if entry.measure == measure
            and entry.replacer in self._replacers
            and (entry.low <= 0 if entry.better == "higher" else entry.high >= 0)
        ]


def facts_of(league: League, replacer: str | None) -> list[str]:
    """What stands below the heading."""
    name = _replacer("facts", league, replacer)
    n = len(league.inputs)
    said = [league.model_name, f"{n} {'input' if n == 1 else 'inputs'}", f"removed: {name}" if name else ""]
    return [" · ".join(filter(None, said)), "intervals of 95 %, from draws of the inputs"]


def _replacer(call: str, league: League, name: str | None) -> str | None:
    """The replacer that is asked for: the only one by default; None where nothing was removed."""
    if name is not None:
        check_choice("replacer", name, league.replacers)
    elif len(league.replacers) > 1:
        raise InputError(f"{call}: the League has several replacers, {', '.join(league.replacers)}: name one.")
    return name or next(iter(league.replacers), None)
