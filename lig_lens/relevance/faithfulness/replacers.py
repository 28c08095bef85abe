"""What takes the place of removed positions of a text: a token, a mean embedding, or nothing."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lig_lens.errors import InputError
from lig_lens.hooked import HookedModel
from lig_lens.inputs.inputs import Inputs
from lig_lens.inputs.token_ids import TokenIds
from lig_lens.models.running import Stop, module_hooks, stop

HookPair = tuple[nn.Module, Callable[..., Any], bool]
_EMBED = "hook_embed"


class Replacer(ABC):
    """What a model is given in place of removed positions. Made for a model, and used for many inputs of one kind."""

    name: ClassVar[str]

    def __init__(self, model: HookedModel) -> None:
        """Look up what is needed of a model.

        Raises:
            InputError: the model does not have it.
        """
        self.model = model

    def check(self, inputs: Inputs) -> None:
        """Raise InputError for an input of which not all positions can be removed."""
        return

    def size(self, inputs: Inputs, removed: int) -> int:
        """How many positions run when so many are removed."""
        return len(inputs)

    @abstractmethod
    def row(self, inputs: Inputs, removed: Bool[Tensor, "pos"]) -> Tensor:
        """The model's argument, [1, ...]."""

    def hooks(self, removed: Sequence[Bool[Tensor, "_"]]) -> Sequence[HookPair]:
        """What has to be on the model while a batch runs; with the positions of each of its inputs."""
        return ()


class _Token(Replacer):
    """A token of the tokenizer's, named as the class is."""

    def __init__(self, model: HookedModel) -> None:
        """See the base class."""
        super().__init__(model)
        tokenizer = getattr(model, "tokenizer", None)
        found = getattr(tokenizer, f"{self.name}_token_id", None)
        if not isinstance(found, int) or not 0 <= found < int(model.cfg.d_vocab):
            raise InputError(f"The model's tokenizer has no {self.name} token: leave the replacer {self.name!r} out.")
        self.id: int = found

    def row(self, inputs: Inputs, removed: Bool[Tensor, "pos"]) -> Tensor:
        """See the base class."""
        (ids,) = inputs.arguments()
        return torch.where(removed.to(ids.device), self.id, ids)


class Mask(_Token):
    """The mask token."""

    name = "mask"


class Unk(_Token):
    """The token of what is not known."""

    name = "unk"


class Pad(_Token):
    """The padding token, which is seen as any other."""

    name = "pad"


class MeanEmbedding(Replacer):
    """The mean of all tokens' embeddings, in place of the token's own; the position's stays."""

    name = "mean"

    def __init__(self, model: HookedModel) -> None:
        """See the base class."""
        super().__init__(model)
        if _EMBED not in model.hook_dict:
            raise InputError(f"The model has no {_EMBED}, where tokens become vectors: leave the replacer 'mean' out.")

    def row(self, inputs: Inputs, removed: Bool[Tensor, "pos"]) -> Tensor:
        """See the base class."""
        (ids,) = inputs.arguments()
        return ids

    def hooks(self, removed: Sequence[Bool[Tensor, "_"]]) -> Sequence[HookPair]:
        """See the base class."""
        positions = torch.stack(list(removed))[..., None]

        mean = self.mean

        def replacing(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            return torch.where(positions.to(output.device), mean.to(output), output)

        return [(self.model.hook_dict[_EMBED], replacing, False)]

    @functools.cached_property
    def mean(self) -> Float[Tensor, "d_model"]:
        """Mean of what the hook shows for every token, since some models scale what stands in their table."""
        d_vocab, seen = int(self.model.cfg.d_vocab), list[Tensor]()
        length = int(getattr(self.model.cfg, "n_ctx", 0) or 0) or d_vocab
        device = self.model.cfg.device

        def read(_module: nn.Module, _args: Any, output: Tensor) -> None:
            seen.append(output[0].double().sum(0))
            stop()

        with torch.no_grad(), module_hooks([(self.model.hook_dict[_EMBED], read, False)]):
            for first in range(0, d_vocab, length):
                ids = torch.arange(first, min(first + length, d_vocab), device=device)
                try:
                    self.model(ids[None])
                except Stop:
                    continue
        return torch.stack(seen).sum(0) / d_vocab


class Dropped(Replacer):
    """Nothing: the text is shorter, and what follows moves up."""

    name = "dropped"

    def check(self, inputs: Inputs) -> None:
        """See the base class."""
        if not isinstance(inputs, TokenIds) or not any(inputs.special):
            raise InputError(
                "The replacer 'dropped' takes positions out, and nothing is left of a text without special tokens: "
                "leave it out."
            )

    def size(self, inputs: Inputs, removed: int) -> int:
        """See the base class."""
        return len(inputs) - removed

    def row(self, inputs: Inputs, removed: Bool[Tensor, "pos"]) -> Tensor:
        """See the base class."""
        (ids,) = inputs.arguments()
        return ids[:, ~removed.to(ids.device)]
