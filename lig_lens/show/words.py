"""Phrases about results that tables, figures and the explorer share; plain text."""

from collections.abc import Sequence

from lig_lens.flow.describe import Facts
from lig_lens.relevance.relevance import Relevance
from lig_lens.show.text import signed_number


def mean_of(averaged: int | None) -> list[str]:
    """Over how many prompts a mean goes, where it is one."""
    return [] if averaged is None else [f"mean of {averaged} prompts"]


def change(facts: Facts) -> str:
    """From where to where the metric goes, with a space before it, or nothing."""
    return "" if facts.change is None else f" ({' → '.join(signed_number(end) for end in facts.change)})"


def moving(facts: Facts) -> str:
    """That contributions are split by message, and what is held, with commas before it, or nothing."""
    said = ", by message" if facts.by_message else ""
    if facts.hold is not None:
        where = "in the clean run" if facts.noising else "where the path starts"
        said += f", {'the other heads' if facts.hold == 'others' else 'what bypasses the heads'} held as {where}"
    return said


def beside_gap(facts: Facts) -> str:
    """The tolerance with a space before it, or nothing."""
    return "" if facts.tol is None else f" (tol {facts.tol:g})"


def asked_of(relevance: Relevance) -> str:
    """The method of a Relevance with its parameters."""
    return ", ".join([relevance.method, *(f"{name} {value}" for name, value in _parameters(relevance).items())])


def ends_of(relevance: Relevance) -> str:
    """The number that is explained, and where it comes from."""
    ends = signed_number(relevance.value)
    if relevance.reference is not None:
        ends = f"{signed_number(relevance.reference)} → {ends}"
    baseline = relevance.settings.get("baseline")
    return f"{relevance.target} {ends}" + (f", from {baseline}" if baseline else "")


def certainty_of(relevance: Relevance) -> list[str]:
    """How far sums are from what they have to be, where there is something that they have to be."""
    if relevance.gap is None:
        return []
    tol = relevance.settings.get("tol")
    said = [f"worst gap {relevance.worst_gap():.1e}" + (f" (tol {tol:g})" if isinstance(tol, float) else "")]
    missed = 0 if relevance.converged is None else int((~relevance.converged).sum())
    return said + ([f"{missed} of {len(relevance.boundaries)} boundaries not converged"] if missed else [])


def special_of(relevance: Relevance) -> str:
    """Scores of special positions, which stand apart from those of what the user wrote; nothing without any."""
    found = [
        f"{token} {signed_number(float(score))}"
        for token, score, special in zip(relevance.tokens, relevance.scores, relevance.special, strict=True)
        if special
    ]
    if len(found) > 4:
        sum_of_rest = sum(float(relevance.scores[at]) for at in _special(relevance)[3:])
        found[3:] = [f"{len(found) - 3} others {signed_number(sum_of_rest)}"]
    return ", ".join(found)


def names_of(relevances: Sequence[Relevance]) -> list[str]:
    """Short names that tell some Relevances apart: the method, and the parameters or settings that differ."""
    names = []
    for one in relevances:
        peers = [_parameters(other) for other in relevances if other.method == one.method]
        differ = [name for name, value in _parameters(one).items() if any(peer.get(name) != value for peer in peers)]
        said = [one.method, *(f"{name} {_parameters(one)[name]}" for name in differ)]
        for what in ("target", "model_name"):
            if any(getattr(other, what) != getattr(one, what) for other in relevances):
                said.append(getattr(one, what))
        baselines = {other.settings.get("baseline") for other in relevances if other.reference is not None}
        if len(baselines) > 1 and one.reference is not None:
            said.append(f"from {one.settings.get('baseline')}")
        names.append(", ".join(said))
    return [
        name if names.count(name) == 1 else f"{name} ({names[:at].count(name) + 1})" for at, name in enumerate(names)
    ]


def _parameters(relevance: Relevance) -> dict[str, object]:
    found = relevance.settings.get("parameters")
    return found if isinstance(found, dict) else {}


def _special(relevance: Relevance) -> list[int]:
    return [at for at, special in enumerate(relevance.special) if special]
