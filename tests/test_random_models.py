"""A model that draws random numbers in its forward pass is found before anything is said of it."""

import random

import numpy as np
import pytest
import torch
from tiny_models import tiny_bridge

import lig_lens

IDS, OTHER = [5, 12, 30, 7, 22], [5, 12, 11, 7, 22]
METRIC = lig_lens.logit_difference(3, 4)

NOISES = {
    "torch": lambda x: torch.randn_like(x),
    "dropout": lambda x: torch.nn.functional.dropout(torch.ones_like(x), 0.5),
    "numpy": lambda x: torch.full_like(x, np.random.rand()),
}


def model_with(where: str, change):
    """A model of its own, to one of whose modules `change` is done."""
    model = tiny_bridge.__wrapped__("gpt2")
    dict(model.named_modules())[where].register_forward_hook(lambda _m, _a, output: change(output))
    return model


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("where", ["embed", "unembed"])
def test_noise_outside_blocks(kind: str, where: str) -> None:
    model = model_with(where, lambda output: output + NOISES[kind](output))
    asked = dict(corrupted=OTHER, target=METRIC, progress=False)
    with pytest.raises(lig_lens.InputError, match="draws random numbers in its forward pass"):
        lig_lens.attribute(model, IDS, **asked)
    with pytest.raises(lig_lens.InputError, match="draws random numbers"):
        lig_lens.patching.patch(model, IDS, OTHER, METRIC, progress=False)
    if where == "embed":
        with pytest.raises(lig_lens.InputError, match="draws random numbers"):
            lig_lens.attribute(model, IDS, maps="attn", progress=False)


def test_noise_in_a_block() -> None:
    model = model_with("blocks.1._original_component.mlp", lambda output: output + 0.1 * torch.randn_like(output))
    with pytest.raises(lig_lens.InputError, match="draws random numbers"):
        lig_lens.attribute(model, IDS, progress=False)
    # The block before does not know of it.
    lig_lens.attribute(model, IDS, maps="attn", layers=[0], progress=False)


def test_what_is_drawn_and_not_used_does_not_matter() -> None:
    drew = []

    def draw(output):
        drew.append((torch.rand(3), np.random.rand(), random.random()))
        return output

    model = model_with("embed", draw)
    found = lig_lens.attribute(model, IDS, maps="attn", progress=False).attn
    assert drew
    dict(model.named_modules())["embed"]._forward_hooks.clear()
    assert torch.equal(found, lig_lens.attribute(model, IDS, maps="attn", progress=False).attn)


def test_generators_are_left_as_they_were() -> None:
    def state():
        return (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist())

    model = tiny_bridge("gpt2")
    before = state()
    lig_lens.attribute(model, IDS, maps="attn", progress=False)
    assert state() == before
