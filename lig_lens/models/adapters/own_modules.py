"""Modules of their own for what a model does with one module several times, so that hooks tell the uses apart.

They share the Parameters themselves: weights count once, are held once, and stay tied.
"""

import copy
from typing import Any

from torch import nn


def shared_copy(module: nn.Module) -> nn.Module:
    """A module that does the same with the same weights."""
    kept = [*module.parameters(), *module.buffers(), *(getattr(one, "config", None) for one in module.modules())]
    return copy.deepcopy(module, {id(one): one for one in kept})


def unroll_albert(body: Any) -> None:
    """Give every layer of ALBERT a module of its own; groups of layers are then the layers themselves."""
    encoder = body.encoder
    groups, calls = list(encoder.albert_layer_groups), encoder.config.num_hidden_layers
    layers = [layer for n in range(calls) for layer in groups[int(n / (calls / len(groups)))].albert_layers]
    encoder.config = copy.copy(encoder.config)  # the model's own goes on saying what was saved
    encoder.config.num_hidden_layers = encoder.config.num_hidden_groups = len(layers)
    encoder.albert_layer_groups = nn.ModuleList(shared_copy(layer) for layer in layers)
