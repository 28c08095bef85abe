"""Prompts of tokens with nothing in them: the same length, special tokens kept, every other token replaced by one."""

from dataclasses import replace

import torch

from lig_lens.errors import InputError, check_choice
from lig_lens.hooked import HookedModel
from lig_lens.inputs.padding import end_of_text
from lig_lens.inputs.token_ids import TokenIds, labelled

TEXT_REFERENCES = ("mask", "pad", "unk", "eos", "bos")
"""Names of the tokens that may stand for nothing, in the order in which they are looked for."""


def default_text_reference(model: HookedModel) -> str | None:
    """The first of `TEXT_REFERENCES` that a model's tokenizer has, and that its head takes for a token."""
    end = end_of_text(model)
    return next((name for name in TEXT_REFERENCES if named_id(model, name) not in (None, end)), None)


def replaced_by(model: HookedModel, inputs: TokenIds, name: str) -> TokenIds:
    """A prompt in which a token that stands for nothing takes the place of all that are not special.

    Args:
        model: whose tokenizer knows the token's id.
        inputs: the prompt.
        name: which token, one of `TEXT_REFERENCES`.

    Raises:
        InputError: an unknown name, a token that the tokenizer does not have, or one that the model's head reads past.
    """
    check_choice("baseline", name, TEXT_REFERENCES)
    token, end = named_id(model, name), end_of_text(model)
    if token is None or token == end:
        there = [other for other in TEXT_REFERENCES if named_id(model, other) not in (None, end)]
        why = (
            f"the model's tokenizer has no {name} token"
            if token is None
            else f"the model's head reads the last token that is not its padding, {token}, so a prompt of those is none"
        )
        raise InputError(
            f"baseline={name!r}: {why}: use {', '.join(repr(one) for one in (*there, 'zero'))}, or give a second "
            "prompt as corrupted."
        )
    kept = torch.tensor(inputs.special, device=inputs.ids.device)
    # Its labels are its own; which positions are special stays as the prompt has it.
    other = labelled(model, torch.where(kept, inputs.ids, token), "baseline")
    return replace(other, special=inputs.special)


def named_id(model: HookedModel, name: str) -> int | None:
    """Id of a token that a model's tokenizer has under a name such as `mask`, if the model has it too."""
    found = getattr(getattr(model, "tokenizer", None), f"{name}_token_id", None)
    return found if isinstance(found, int) and 0 <= found < int(model.cfg.d_vocab) else None
