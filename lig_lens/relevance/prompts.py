"""Several Relevances of one prompt."""

import json
from collections.abc import Iterable

from lig_lens.errors import InputError
from lig_lens.inputs.pixels import Pixels
from lig_lens.inputs.token_ids import TokenIds
from lig_lens.relevance.relevance import Relevance

_RECORDS = (TokenIds.kept_as, Pixels.kept_as)


def prompt_key(relevance: Relevance) -> tuple[tuple[str, ...], str]:
    """Equal for Relevances of one prompt alone: its tokens, and what the settings keep of it.

    Patches are called alike in all images of a model, and some tokens with ids of their own are written alike.
    """
    kept = [relevance.settings.get(name) for name in _RECORDS]
    return relevance.tokens, json.dumps(kept, sort_keys=True)


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
        if prompt_key(one) != prompt_key(given[0]):
            raise InputError(
                f"{call}: the Relevances are of different prompts, {_differ(given[0], one)}: give those of one."
            )
    return given


def _differ(one: Relevance, other: Relevance) -> str:
    if one.tokens != other.tokens:
        return f"{' '.join(one.tokens)[:60]!r} and {' '.join(other.tokens)[:60]!r}"
    what = "pixels" if one.of_image or other.of_image else "token ids"
    return f"whose tokens are alike, but not the {what} in their settings"
