"""Results by the labels under which a page lets them be chosen."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from lig_lens.errors import InputError
from lig_lens.flow.flow import Flow
from lig_lens.relevance.relevance import Relevance
from lig_lens.show.explorer.contents import flow_names
from lig_lens.show.words import names_of

_Result = TypeVar("_Result", Flow, Relevance)


def labelled(results: object) -> dict[str, Flow] | dict[str, Relevance]:
    """Flows, or Relevances, by their labels; those without get one from what they were asked for.

    Args:
        results: as `explore` takes them.

    Raises:
        InputError: none, something else, or both kinds.
    """
    if isinstance(results, (Flow, Relevance)):
        results = [results]
    labels: list[object] | None = list(results) if isinstance(results, Mapping) else None
    given = list(results.values()) if isinstance(results, Mapping) else results
    given = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else None
    odd = [results] if given is None else [one for one in given if not isinstance(one, (Flow, Relevance))]
    if given is None or odd:
        raise InputError(
            f"explore: got {type(odd[0]).__name__}: give a Flow, several, or a mapping of labels to Flows (of an "
            "average its .mean); or the same of Relevances."
        )
    if not given:
        raise InputError("explore: no Flow: give at least one.")
    flows = [one for one in given if isinstance(one, Flow)]
    relevances = [one for one in given if isinstance(one, Relevance)]
    if flows and relevances:
        raise InputError("explore: got Flows and Relevances, which have pages of their own: give one kind.")
    if flows:
        return dict(_unique(flow_names(flows) if labels is None else labels, flows))
    return dict(_unique(_relevance_names(relevances) if labels is None else labels, relevances))


def _relevance_names(relevances: Sequence[Relevance]) -> list[str]:
    """What tells those of one prompt apart."""
    found: dict[int, str] = {}
    for tokens in dict.fromkeys(one.tokens for one in relevances):
        places = [at for at, one in enumerate(relevances) if one.tokens == tokens]
        found |= zip(places, names_of([relevances[at] for at in places]), strict=True)
    return [found[at] for at in range(len(relevances))]


def _unique(labels: Sequence[object], results: Sequence[_Result]) -> Iterator[tuple[str, _Result]]:
    """Labels that are equal for one prompt get numbers; across prompts the page tells them apart, a dict does not."""
    seen: dict[str, int] = {}
    for label, result in zip(map(str, labels), results, strict=True):
        seen[label] = seen.get(label, 0) + 1
        yield (label if seen[label] == 1 else f"{label} ({seen[label]})"), result
