"""Several Relevances of one prompt."""

from collections.abc import Iterable

from lig_lens.errors import InputError
from lig_lens.relevance.relevance import Relevance


def of_one_prompt(call: str, relevances: "Relevance | Iterable[Relevance]") -> list[Relevance]:
    """One Relevance or several as a list.

    Args:
        call: who asks, for messages.
        relevances: one, or several.

    Raises:
        InputError: something else, none, or some of different prompts.
    """
    given = [relevances] if isinstance(relevances, Relevance) else list(relevances)
    odd = [one for one in given if not isinstance(one, Relevance)]
    if odd or not given:
        raise InputError(f"{call}: got {type(odd[0]).__name__ if odd else 'none'}: give a Relevance, or several.")
    for one in given:
        if one.tokens != given[0].tokens:
            raise InputError(
                f"{call}: the Relevances are of different prompts, {' '.join(given[0].tokens)[:60]!r} and "
                f"{' '.join(one.tokens)[:60]!r}: give those of one."
            )
    return given
