"""Which token a classifier's head takes for padding, and so reads past."""

from typing import Any

# What transformers' decoders call the head that reads the last token of a text.
_OF_LAST_TOKEN = "score"


def reads_last_token(model: object) -> bool:
    """Whether a classifier's head reads the last token that is not padding, as those of transformers' decoders do."""
    return hasattr(_plain(model), _OF_LAST_TOKEN)


def end_of_text(model: object) -> int | None:
    """Id of the token that such a head reads past; None for other models, and where the config names none."""
    found = getattr(getattr(_plain(model), "config", None), "pad_token_id", None)
    return int(found) if reads_last_token(model) and found is not None else None


def _plain(model: object) -> Any:
    return getattr(model, "original_model", None)
