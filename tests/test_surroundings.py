"""What surrounds a call, such as dtypes, autocast, flags of the model and of torch, neither changes nor is changed."""

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_hooked import has_hooked_transformer, tiny_hooked
from tiny_models import fresh_bridge, tiny_bridge

import lig_lens

IDS, OTHER = [5, 12, 30, 7, 22], [5, 12, 11, 7, 22]
METRIC = lig_lens.logit_difference(3, 4)


def ask_everything(model: Any, progress: bool = False) -> list[torch.Tensor]:
    """What every entry gives."""
    layers = {"progress": progress}
    flow = lig_lens.attribute(model, IDS, tol=1e-2, **layers)
    to_metric = lig_lens.attribute(model, IDS, corrupted=OTHER, target=METRIC, tol=1e-2, **layers)
    effects = [
        lig_lens.patching.patch(model, IDS, OTHER, METRIC, **layers),
        lig_lens.patching.knock_out(model, IDS, METRIC, **layers),
        lig_lens.patching.knock_out(model, IDS, METRIC, renormalise=True, **layers),
        lig_lens.patching.knock_out(model, IDS, METRIC, corrupted=OTHER, **layers),
        lig_lens.patching.ablate(model, IDS, METRIC, [OTHER], **layers),
        lig_lens.patching.ablate(model, IDS, METRIC, [OTHER], by="resample", **layers),
        *lig_lens.scores(model, IDS, OTHER, METRIC).values(),
    ]
    return [flow.attn, flow.mlp, flow.block, to_metric.attn, *(effect.values for effect in effects)]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS = {
    "float64 by default": lambda: default_dtype(torch.float64),
    "float16 by default": lambda: default_dtype(torch.float16),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
}


@pytest.mark.once
@pytest.mark.parametrize("name", SURROUNDINGS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_surroundings_change_nothing(name: str, kind: str) -> None:
    model = tiny_bridge(kind)
    expected = ask_everything(model)
    with SURROUNDINGS[name]():
        found = ask_everything(model)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)


FLAGS = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox", "gemma2", "hooked"])
def test_what_else_a_model_shows_changes_nothing(kind: str, flag: str) -> None:
    """TransformerLens' switches for more hooks reroute attention, before a block is known and after."""
    if kind == "hooked" and not has_hooked_transformer():
        pytest.skip("needs HookedTransformer")
    model = tiny_hooked.__wrapped__("gpt2") if kind == "hooked" else fresh_bridge(kind)
    switch = getattr(model, f"set_{flag}")
    flows = []
    for on in (True, False, True):
        switch(on)
        flows.append(lig_lens.attribute(model, IDS, layers=[1], tol=1e-2, progress=False))
    first, plain, second = flows
    for found in (first, second):
        for name in plain.maps:
            torch.testing.assert_close(getattr(found, name), getattr(plain, name), rtol=1e-4, atol=2e-5)


def state_of(model: torch.nn.Module) -> dict[str, Any]:
    """All that a caller could find changed: attributes, hooks, flags of parameters, tensors with a graph."""
    found: dict[str, Any] = {"training": model.training}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name.startswith("_") and "hooks" in name:
                found[f"{path}.{name}"] = len(value) if hasattr(value, "__len__") else value
            elif isinstance(value, torch.Tensor):
                found[f"{path}.{name}"] = (value.requires_grad, value.grad_fn is not None, value.dtype)
            else:
                found[f"{path}.{name}"] = type(value).__name__
    for name, parameter in model.named_parameters():
        found[name] = (parameter.requires_grad, parameter.dtype, parameter.grad is None, parameter.data_ptr())
    return found


class Interrupted(BaseException):
    pass


def failing(how: type[BaseException]) -> Any:
    """A metric that works a few times and then ends the call."""
    count = iter(range(3))

    def function(logits: torch.Tensor) -> torch.Tensor:
        if next(count, None) is None:
            raise how("enough")
        return logits[0, -1, 3]

    return lig_lens.metric(function)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_the_model_is_left_as_it_was(kind: str) -> None:
    model = tiny_bridge.__wrapped__(kind)
    next(iter(model.parameters())).requires_grad_(False)
    with torch.no_grad():
        plain = model(torch.tensor([IDS]))
    before = state_of(model)
    ask_everything(model)
    assert state_of(model) == before
    for how in (RuntimeError, KeyboardInterrupt, Interrupted):
        with pytest.raises(how):
            lig_lens.attribute(model, IDS, corrupted=OTHER, target=failing(how), progress=False)
        with pytest.raises(how):
            lig_lens.patching.patch(model, IDS, OTHER, failing(how), progress=False)
        assert state_of(model) == before
    with pytest.raises(lig_lens.InputError):
        lig_lens.attribute(model, [99], progress=False)
    assert state_of(model) == before
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(torch.tensor([IDS])), plain) and torch.equal(model(torch.tensor([IDS])), plain)


@pytest.mark.skipif(not has_hooked_transformer(), reason="this TransformerLens has no HookedTransformer")
def test_a_hooked_transformer_is_left_as_it_was() -> None:
    model = tiny_hooked.__wrapped__("gpt2")
    before = state_of(model)
    ask_everything(model)
    assert state_of(model) == before
    copy.deepcopy(model)


def test_what_pickled_before_pickles_after() -> None:
    model = tiny_bridge.__wrapped__("gpt2")

    def pickles() -> str:
        try:
            pickle.dumps(model)
        except Exception as error:
            return type(error).__name__
        return "yes"

    before = pickles()
    ask_everything(model)
    assert pickles() == before


def test_a_compiled_model_gives_the_models_own_numbers() -> None:
    model = lig_lens.load_model("induction")
    asked = {"maps": "attn", "progress": False}
    flow = lig_lens.attribute(torch.compile(model), "lamp lake mouse lamp", **asked)
    assert torch.equal(flow.attn, lig_lens.attribute(model, "lamp lake mouse lamp", **asked).attn)
    assert flow.model_name == "induction"


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(lig_lens.InputError, match="Unknown device 'abacus'"):
        lig_lens.load_model("induction", device="abacus")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(lig_lens.InputError, match=r"'cuda' cannot be used here .*: try device 'cpu'"):
        lig_lens.load_model("induction", device="cuda")


def test_tokens_that_only_the_tokenizer_has_are_named() -> None:
    model = lig_lens.load_model("induction")
    model.tokenizer = copy.deepcopy(model.tokenizer)
    model.tokenizer.add_tokens(["quagga"])
    with pytest.raises(lig_lens.InputError, match=r"'quagga', which the tokenizer reads as token .* does not have"):
        lig_lens.attribute(model, "lamp quagga", maps="attn", progress=False)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Of all logits but one: a finite number, whose gradient is NaN."""
    masked = logits[0, -1].masked_fill(torch.arange(logits.shape[-1]) == 3, float("-inf"))
    p = masked.softmax(-1)
    return -torch.where(p > 0, p * masked.log_softmax(-1), 0.0).sum()


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_metric_whose_gradient_is_nan_is_named(kind: str) -> None:
    model, metric = tiny_bridge(kind), lig_lens.metric(entropy)
    with pytest.raises(lig_lens.InputError, match="The metric entropy has a gradient that is NaN or infinite"):
        lig_lens.attribute(model, IDS, corrupted=OTHER, target=metric, progress=False)
    with pytest.raises(lig_lens.InputError, match="The metric entropy has a gradient that is NaN"):
        lig_lens.scores(model, IDS, OTHER, metric)
    # Interventions need no gradient.
    assert bool(lig_lens.patching.patch(model, IDS, OTHER, metric, progress=False).values.isfinite().all())


def test_an_interrupt_leaves_a_half_precision_model_as_it_was() -> None:
    """Torch calls a module's hooks after errors, and not after Ctrl-C."""
    model = tiny_bridge.__wrapped__("llama", torch.bfloat16)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    asked = {"corrupted": [5, 12, 11, 7], "target": lig_lens.logit_difference(9, 17), "progress": False}
    expected, calls = lig_lens.attribute(model, [5, 12, 30, 7], **asked), []

    def interrupt(*_: object) -> None:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt

    handle = model.blocks[1].mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        lig_lens.attribute(model, [5, 12, 30, 7], **asked)
    handle.remove()
    for name, weight in model.named_parameters():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, before[name])
    torch.testing.assert_close(lig_lens.attribute(model, [5, 12, 30, 7], **asked).attn, expected.attn)


def test_a_metric_may_ask_for_another_attribution() -> None:
    """Of the same half-precision model, while it is held in single."""
    model = tiny_bridge.__wrapped__("llama", torch.bfloat16)

    def nosy(logits: torch.Tensor) -> torch.Tensor:
        lig_lens.attribute(model, [5, 12], corrupted=[5, 9], target=lig_lens.logit_difference(3, 4), progress=False)
        return logits[0, -1, 9]

    asked = {"corrupted": [5, 12, 11], "layers": [1], "tol": 0.5, "progress": False}
    found = lig_lens.attribute(model, [5, 12, 30], target=lig_lens.metric(nosy), **asked)
    expected = lig_lens.attribute(model, [5, 12, 30], target=lig_lens.metric(lambda x: x[0, -1, 9]), **asked)
    torch.testing.assert_close(found.attn, expected.attn)
    assert all(weight.dtype == torch.bfloat16 for weight in model.parameters())
