"""Phrases about a Flow that tables, figures and the explorer share; plain text."""

from lig_lens.flow.describe import Facts
from lig_lens.show.text import signed_number


def mean_of(averaged: int | None) -> list[str]:
    """Over how many prompts a mean goes, where it is one."""
    return [] if averaged is None else [f"mean of {averaged} prompts"]


def change(facts: Facts) -> str:
    """From where to where the metric goes, with a space before it, or nothing."""
    return "" if facts.change is None else f" ({' → '.join(signed_number(end) for end in facts.change)})"


def by_message(facts: Facts) -> str:
    """That contributions are split by message, with a comma before it, or nothing."""
    return ", by message" if facts.by_message else ""


def beside_gap(facts: Facts) -> str:
    """The tolerance with a space before it, or nothing."""
    return "" if facts.tol is None else f" (tol {facts.tol:g})"
