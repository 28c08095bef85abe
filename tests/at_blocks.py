"""Blocks of a model, called on a prompt."""

from collections.abc import Sequence
from typing import Any

import torch

from lig_lens.blocks.call import BlockCall
from lig_lens.blocks.known import Blocks, Needs
from lig_lens.blocks.recording import record_calls
from lig_lens.blocks.values import Values
from lig_lens.inputs.kinds import kind_of
from lig_lens.inputs.token_ids import TokenIds
from lig_lens.models.stack import stack_of


def read_prompt(model: Any, prompt: Any, **options: Any) -> Any:
    """One prompt, as the kind of model takes it."""
    return kind_of(model).read(model, prompt, **options)


def inputs_of(model: Any, ids: torch.Tensor | list[int]) -> TokenIds:
    return read_prompt(model, ids)


def calls_at(model: Any, ids: torch.Tensor | list[int], layers: Sequence[int]) -> dict[int, BlockCall]:
    """How the model calls its blocks on a prompt."""
    return record_calls(stack_of(model), inputs_of(model, ids), layers, lambda call: call).visited


def values_at(model: Any, ids: torch.Tensor | list[int], layers: Sequence[int], **needs: bool) -> dict[int, Values]:
    """A prompt's values at some blocks."""
    return Blocks(stack_of(model), layers).record(inputs_of(model, ids), Needs(**needs)).visited
