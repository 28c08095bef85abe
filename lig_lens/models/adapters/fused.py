"""Linear maps that make several things at once, taken apart so that each has hooks. Weights stay where they are."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class Fused(nn.Module):
    """A fused linear map that runs its parts one by one, under their names.

    Its outputs are `groups` times a row of one piece of each part: with one group all of a part's outputs stand
    together, with one per head each head has its own pieces.
    """

    def __init__(
        self, linear: nn.Linear, parts: Sequence[str], groups: int = 1, biases: Mapping[str, nn.Parameter] | None = None
    ) -> None:
        """Take a map apart.

        Args:
            linear: the map; its Parameters become this module's.
            parts: names of what it makes, in order.
            groups: see the class.
            biases: of parts, beside the map's own.
        """
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.parts, self.groups = tuple(parts), groups
        for name, bias in (biases or {}).items():
            self.register_parameter(f"{name}_bias", bias)
        for number, name in enumerate(parts):
            self.add_module(name, Part(self, number))

    def forward(self, hidden_states: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """What the fused map gives, with the biases of parts added."""
        made = [getattr(self, name)(hidden_states) for name in self.parts]
        pieces = [one.view(*one.shape[:-1], self.groups, -1) for one in made]
        return torch.stack(pieces, -2).flatten(-3)

    def rows(self, of_whole: Tensor, number: int) -> Tensor:
        """Rows of the weight or bias that make a part; a view where there is one group."""
        pieces = of_whole.view(self.groups, len(self.parts), -1, *of_whole.shape[1:])
        return pieces[:, number].flatten(0, 1)


class Part(nn.Module):
    """One part of a fused map, as a linear map of its own that holds no weights of its own."""

    def __init__(self, whole: Fused, number: int) -> None:
        super().__init__()
        self.__dict__["whole"] = whole  # no child, whose weights would be found here too
        self.number = number
        self.out_features, self.in_features = self.weight.shape

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The whole's, as far as it is this part's."""
        return self._whole.rows(self._whole.weight, self.number)

    @property
    def bias(self) -> Float[Tensor, "out"] | None:
        """The whole's, as far as it is this part's, or one that this part alone has."""
        own: Tensor | None = getattr(self._whole, f"{self._whole.parts[self.number]}_bias", None)
        return own if self._whole.bias is None else self._whole.rows(self._whole.bias, self.number)

    @property
    def _whole(self) -> Fused:
        whole: Fused = self.__dict__["whole"]
        return whole

    def forward(self, hidden_states: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The linear map."""
        return functional.linear(hidden_states, self.weight, self.bias)


def split_modernbert(body: Any) -> None:
    """Take apart ModernBERT's queries, keys and values, and its MLP's gate."""
    for layer in body.layers:
        layer.attn.Wqkv = Fused(layer.attn.Wqkv, ("q", "k", "v"))
        layer.mlp.Wi = Fused(layer.mlp.Wi, ("gate", "up"))
