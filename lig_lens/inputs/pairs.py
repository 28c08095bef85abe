"""Prompts as users give them: one or several, each with a second one where there is one."""

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lig_lens.errors import InputError
from lig_lens.hooked import HookedModel
from lig_lens.inputs.inputs import Inputs
from lig_lens.inputs.kinds import kind_of
from lig_lens.inputs.source_and_target import is_source_and_target

Pair = tuple[Inputs, Inputs | None]
"""A prompt, and its corrupted counterpart."""


def is_batch(prompt: Any, stream: str | None = None) -> bool:
    """Whether `prompt` is several prompts: a sequence of texts, of images or of id sequences (not one of ids).

    With a stream, a tuple of two is one prompt, a source and a target.
    """
    if stream is not None and is_source_and_target(prompt):
        return False
    if isinstance(prompt, (str, Tensor)) or not isinstance(prompt, Sequence) or not prompt:
        return False
    return not isinstance(prompt[0], numbers.Integral)


def read_pairs(
    model: HookedModel,
    prompt: Any,
    corrupted: Any,
    attention_mask: Any,
    prepend_bos: Any,
    may_equal: bool = False,
    stream: str | None = None,
) -> list[Pair]:
    """Read prompts, and the corrupted prompt of each where there is one.

    Args:
        model: a hooked model.
        prompt: one, or several (see `is_batch`).
        corrupted: one for each, or None.
        attention_mask: one for each, or None; it holds for the corrupted prompt too, where that is padded alike.
        prepend_bos: for texts; the tokenizer's own default with None.
        may_equal: whether a corrupted prompt may equal its prompt.
        stream: of a model with an encoder and a decoder, whose prompts are sources and targets.

    Raises:
        InputError: what cannot be read, or prompts of different lengths.
    """
    read_one = kind_of(model, stream).read
    several = is_batch(prompt, stream)
    prompts, others, masks = (
        one_each(several, prompt, prompt),
        one_each(several, prompt, corrupted, "corrupted"),
        one_each(several, prompt, attention_mask, "attention_mask"),
    )
    read: list[Pair] = []
    for number, (one, other, mask) in enumerate(zip(prompts, others, masks, strict=True)):
        try:
            clean = read_one(model, one, prepend_bos=prepend_bos, attention_mask=mask)
            second = None
            if other is not None:
                padded = mask if _padded_alike(other, one, mask) else None
                second = read_one(
                    model,
                    clean.beside(other),
                    prepend_bos=prepend_bos,
                    attention_mask=padded,
                    what="corrupted prompt",
                )
                clean.check_joins(second)
                if not may_equal:
                    check_different(clean, second)
        except InputError as error:
            where = f"Prompt {number} of {len(prompts)}: " if several else ""
            raise InputError(f"{where}{error}") from error
        read.append((clean, second))
    return read


def one_each(several: bool, prompt: Any, value: Any, what: str = "prompt") -> list[Any]:
    """`value` as a list with one entry per prompt."""
    if not several:
        return [value]
    if value is None:
        return [None] * len(prompt)
    if isinstance(value, str) or len(value) != len(prompt):
        given = "one text" if isinstance(value, str) else f"{len(value)} entries"
        raise InputError(f"{what} has {given} for {len(prompt)} prompts: give a list with one per prompt.")
    return list(value)


def read_pair(model: HookedModel, clean: Any, other: Any, prepend_bos: Any) -> Pair:
    """Read one prompt, and another of as many tokens if there is one.

    Raises:
        InputError: several prompts, prompts of different lengths, or what cannot be read.
    """
    if is_batch(clean) or is_batch(other):
        raise InputError("A list of prompts: give one pair at a time, and average() the results.")
    return read_pairs(model, clean, other, None, prepend_bos, may_equal=True)[0]


def check_different(clean: Inputs, *others: Inputs) -> None:
    """Raise InputError if nothing would move between a prompt and others, because all of them equal it."""
    if others and all(other.record() == clean.record() for other in others):
        raise InputError(
            f"corrupted equals the prompt, {clean.shown}: nothing moves between them, so all that is measured against "
            "it would be 0. Change one of them."
        )


def _padded_alike(other: Any, one: Any, mask: Any) -> bool:
    """Whether two prompts are token ids with the same padding where a mask says there is some."""
    one, other = (prompt[0] if is_source_and_target(prompt) else prompt for prompt in (one, other))
    if mask is None or isinstance(one, str) or isinstance(other, str):
        return False
    try:
        ids, others, kept = (torch.as_tensor(value).reshape(-1) for value in (one, other, mask))
    except (TypeError, ValueError, RuntimeError):
        return False  # refused by name where they are read
    same_length = len(ids) == len(others) == len(kept)
    return same_length and bool((ids[kept == 0] == others[kept == 0]).all())
