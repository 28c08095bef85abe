"""DeBERTa in both versions, in modules on which hooks show what their names say."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lig_lens.models.adapters.fused import Fused
from lig_lens.models.adapters.own_modules import shared_copy


def prepare_deberta(body: Any) -> None:
    """Take apart queries, keys and values of the first version, head by head, with the biases that are added later."""
    for layer in body.encoder.layer:
        attention = layer.attention.self
        biases = {part: getattr(attention, f"{part}_bias") for part in ("q", "v")}
        attention.in_proj = Fused(attention.in_proj, ("q", "k", "v"), attention.num_attention_heads, biases)
        for part, bias in biases.items():  # what is added later is then nothing
            delattr(attention, f"{part}_bias")
            attention.register_buffer(f"{part}_bias", torch.zeros_like(bias), persistent=False)


def prepare_deberta_v2(body: Any) -> None:
    """Project relative positions by modules of their own, and put the convolution into the layer that it follows."""
    encoder = body.encoder
    for layer in encoder.layer:
        attention = layer.attention.self
        if not attention.relative_attention:
            continue
        attention.register_forward_pre_hook(_same_positions, with_kwargs=True)
        if attention.share_att_key:
            attention.pos_key_proj = shared_copy(attention.key_proj)
            attention.pos_query_proj = shared_copy(attention.query_proj)
            attention.share_att_key = False
    if encoder.conv is not None:
        encoder.layer[0] = _ConvolvedLayer(encoder.layer[0], encoder.conv)
        encoder.conv = None


def _same_positions(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Give attention one table of relative positions, which it takes for no batch of them."""
    return args, kwargs | {"relative_pos": kwargs["relative_pos"][:1]}


class _ConvolvedLayer(nn.Module):
    """The first layer of models with a convolution, which reads what enters that layer and what leaves it.

    The encoder runs it between two layers, with its own input, where no block gets to see it.
    """

    def __init__(self, layer: Any, conv: nn.Module) -> None:
        super().__init__()
        self.attention, self.intermediate, self.output = layer.attention, layer.intermediate, layer.output
        self.conv = conv

    def forward(
        self,
        hidden_states: Float[Tensor, "batch pos d_model"],
        attention_mask: Float[Tensor, "batch 1 pos pos"],
        **options: Any,
    ) -> tuple[Float[Tensor, "batch pos d_model"], Tensor | None]:
        """The layer, then the convolution."""
        attended, pattern = self.attention(hidden_states, attention_mask, **options)
        output = self.output(self.intermediate(attended), attended)
        tokens = attention_mask[:, 0].diagonal(dim1=-2, dim2=-1)  # what is no padding sees itself
        return self.conv(hidden_states, output, tokens), pattern
