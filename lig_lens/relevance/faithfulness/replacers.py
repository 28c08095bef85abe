"""What takes the place of removed positions of a text: a token, a mean embedding, or nothing."""

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lig_lens.errors import InputError
from lig_lens.hooked import HookedModel
from lig_lens.inputs.inputs import Inputs
from lig_lens.inputs.text_references import named_id
from lig_lens.inputs.token_ids import TokenIds, arbitrary_ids
from lig_lens.models.running import Stop, first_tensor, module_hooks, stop

HookPair = tuple[nn.Module, Callable[..., Any], bool]
# Where tokens become vectors, before positions are added: of bridges, HookedEncoder, HookedTransformer. On an encoder's
# bridge hook_embed is behind the sum and its norm.
_EMBEDS = ("embed.hook_out", "embed.hook_embed", "hook_embed")


class Replacer(ABC):
    """What a model is given in place of removed positions. Made for a model, and used for many inputs of one kind."""

    def __init__(self, model: HookedModel, name: str) -> None:
        """Look up what is needed of a model.

        Args:
            model: whose inputs they are.
            name: as tables have it; one class may serve several.

        Raises:
            InputError: the model does not have it.
        """
        self.model, self.name = model, name

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


class Token(Replacer):
    """The token that the tokenizer has under this name: mask, unk, pad; refused where the head takes it for the end."""

    def __init__(self, model: HookedModel, name: str) -> None:
        """See the base class."""
        super().__init__(model, name)
        found = named_id(model, self.name)
        if found is None:
            raise InputError(f"The model's tokenizer has no {self.name} token: leave the replacer {self.name!r} out.")
        self.id: int = found
        ids = arbitrary_ids(model)
        ids = ids[:, ids[0] != found]
        with torch.no_grad():
            ended = first_tensor(model(torch.cat([ids, ids.new_full((1, 1), found)], 1)))
            shorter = first_tensor(model(ids))
        if ended.shape == shorter.shape and torch.allclose(ended, shorter, rtol=1e-5, atol=1e-6):
            raise InputError(
                f"The model takes the {self.name!r} token as the end of a text, and reads its class before it: leave "
                f"the replacer {self.name!r} out."
            )

    def row(self, inputs: Inputs, removed: Bool[Tensor, "pos"]) -> Tensor:
        """See the base class."""
        (ids,) = inputs.arguments()
        return torch.where(removed.to(ids.device), self.id, ids)


class MeanEmbedding(Replacer):
    """The mean of all tokens' embeddings, in place of the token's own; the position's stays."""

    def __init__(self, model: HookedModel, name: str) -> None:
        """See the base class."""
        super().__init__(model, name)
        hook = next((one for one in _EMBEDS if one in model.hook_dict), None)
        if hook is not None:
            self._embedding = model.hook_dict[hook]
            twice = self._embedded(torch.zeros(2, dtype=torch.long))
        if hook is None or not torch.equal(twice[0], twice[1]):
            raise InputError(
                "The model shows no embeddings of tokens without their positions: leave the replacer 'mean' out."
            )

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

        return [(self._embedding, replacing, False)]

    @functools.cached_property
    def mean(self) -> Float[Tensor, "d_model"]:
        """Mean of what the hook shows for every token, since some models scale what stands in their table."""
        d_vocab = int(self.model.cfg.d_vocab)
        length = int(getattr(self.model.cfg, "n_ctx", 0) or 0) or d_vocab
        parts = [self._embedded(some).double().sum(0) for some in torch.split(torch.arange(d_vocab), length)]
        return torch.stack(parts).sum(0) / d_vocab

    def _embedded(self, ids: Int[Tensor, "pos"]) -> Float[Tensor, "pos d_model"]:
        """What the hook shows; the model runs no further."""
        seen = list[Tensor]()

        def read(_module: nn.Module, _args: Any, output: Tensor) -> None:
            seen.append(output[0])
            stop()

        with torch.no_grad(), module_hooks([(self._embedding, read, False)]), contextlib.suppress(Stop):
            self.model(ids[None].to(self.model.cfg.device))
        return seen[0]


class Dropped(Replacer):
    """Nothing: the text is shorter, and what follows moves up."""

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
