"""What switches in a forward pass is seen, whatever it is called, and what does not is not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from at_blocks import values_at
from checkpoints import saved
from families import FAMILIES
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

import lig_lens as ll
from lig_lens.models.switches import Switches

# Of each, a point at which its derivative jumps.
BENDS: dict[str, tuple[Callable[[Tensor], Any], float]] = {
    "relu": (functional.relu, 0.0),
    "in place": (lambda x: x.clone().relu_(), 0.0),
    "leaky relu, in place": (lambda x: functional.leaky_relu_(x.clone()), 0.0),
    "relu6": (nn.ReLU6(), 6.0),
    "hard tanh": (nn.Hardtanh(-0.5, 0.5), 0.5),
    "threshold": (nn.Threshold(0.25, 0.25), 0.25),
    "soft shrink": (nn.Softshrink(0.5), -0.5),
    "clamp": (lambda x: x.clamp(max=0.3), 0.3),
    "clip, in place": (lambda x: x.clone().clip_(-0.7, 5.0), -0.7),
    "clamp_min": (lambda x: torch.clamp_min(x, -0.2), -0.2),
    "maximum": (lambda x: x.maximum(torch.full_like(x, 0.4)), 0.4),
    "max of two": (lambda x: torch.max(x, torch.full_like(x, 0.1)), 0.1),
    "abs": (torch.abs, 0.0),
}


def switches(function: Callable[[Tensor], Any], at: list[float]) -> tuple[Switches, Tensor]:
    """What is seen, and the margins at some points."""
    x = torch.tensor(at, dtype=torch.float64)[:, None]
    seen = Switches(lambda n: function(torch.full((n, 1), 0.2, dtype=torch.float64)))
    return seen, seen.margins(len(at), lambda: function(x)) if seen else torch.zeros(len(at), 0)


@pytest.mark.parametrize("name", BENDS)
def test_a_margin_changes_its_sign_where_the_derivative_jumps(name: str) -> None:
    function, at = BENDS[name]
    seen, margins = switches(function, [at - 1e-3, at + 1e-3])
    assert bool(seen) and bool(((margins[0] > 0) != (margins[1] > 0)).any())


# Which of transformers' activations have a kink, as the jump of a difference quotient shows.
@pytest.mark.parametrize("name", sorted(ACT2FN))
def test_activations_that_bend_are_seen(name: str) -> None:
    made = ACT2FN[name]
    x = torch.linspace(-8, 8, 160_001, dtype=torch.float64)  # every bound of an activation is one of them
    with torch.no_grad():
        slope = (made.double() if isinstance(made, nn.Module) else made)(x).diff() / x.diff()
    if name == "xielu":
        pytest.skip("made of torch.where, and its slope does not jump")
    bends = bool((slope.diff().abs() > 1e-2).any())
    assert bool(switches(made, [0.0])[0]) >= bends


def test_smooth_functions_do_not_switch() -> None:
    for function in (functional.gelu, functional.silu, torch.tanh, lambda x: x.softmax(-1), lambda x: x.max(-1)):
        assert not switches(function, [0.0])[0]


@pytest.mark.parametrize("held", [False, True])
def test_held_experts_do_not_switch(held: bool, tmp_path: Path) -> None:
    saved("MixtralForCausalLM", tmp_path, **{**FAMILIES["MixtralForCausalLM"].config, "num_experts_per_tok": 1})
    model = ll.load_model(str(tmp_path), device="cpu")
    call = values_at(model, [5, 9, 7], [1], routes=held)[1].call
    assert bool(Switches(lambda n: call.run(call.resid_pre.expand(n, -1, -1)))) != held
