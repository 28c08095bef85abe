"""One block alone does what it does inside the model, and leaves nothing behind on it."""

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from at_blocks import calls_at, inputs_of, values_at
from tiny_hooked import has_hooked_transformer, tiny_hooked
from tiny_models import KINDS, tiny_bridge
from torch import nn

import lig_lens
from lig_lens.blocks.call import BlockCall, Seen
from lig_lens.blocks.recording import record_calls
from lig_lens.models.running import prepared
from lig_lens.models.stack import stack_of


def hooks_on(model: nn.Module) -> int:
    """Hooks of every kind on every module: torch's own and TransformerLens' lists."""
    count = 0
    for module in model.modules():
        count += len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        count += len(getattr(module, "fwd_hooks", ())) + len(getattr(module, "bwd_hooks", ()))
    return count


def state(model: nn.Module) -> list[tuple[Any, ...]]:
    return [(p.data_ptr(), p.dtype, p.requires_grad) for p in model.parameters()]


HOOKED = ["hooked gpt2", "hooked bert"] if has_hooked_transformer() else []


@pytest.fixture(params=["bert", "llama", *HOOKED])
def model(request: pytest.FixtureRequest, ids: torch.Tensor) -> Iterator[Any]:
    generation, kind = request.param.split() if " " in request.param else ("bridge", request.param)
    model = tiny_bridge(kind) if generation == "bridge" else tiny_hooked(kind)
    model(ids[None])  # a bridge wires some hooks of its own in its first forward pass
    yield model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [0, 1])
def test_block_alone_is_exact(kind: str, layer: int, ids: torch.Tensor) -> None:
    model = tiny_bridge(kind)
    call = calls_at(model, ids, [layer])[layer]
    with torch.no_grad(), prepared(model, call.block):
        batch = call.resid_pre.expand(3, -1, -1)
        out = call.run(batch)
    torch.testing.assert_close(out, call.resid_post.expand_as(out), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_items_do_not_mix(kind: str, ids: torch.Tensor) -> None:
    model = tiny_bridge(kind)
    call = calls_at(model, ids, [1])[1]
    with torch.no_grad():
        batch = torch.stack([call.resid_pre, 0.5 * call.resid_pre, call.resid_pre.flip(0)])
        together = call.run(batch)
        alone = [call.run(item[None]) for item in batch]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_tail_from_nodes_gives_resid_post(kind: str, ids: torch.Tensor) -> None:
    model = tiny_bridge(kind)
    values = values_at(model, ids, [1])[1]
    heads = values.heads
    with torch.no_grad():
        out = values.run_tail(heads.attn_out(heads.z, 1.0)[None], values.resid_pre[None])
        z = values.read_z(values.resid_pre[None])
    torch.testing.assert_close(out[0], values.resid_post, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(z[0], heads.z, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_match_finite_differences(kind: str, ids: torch.Tensor) -> None:
    model = tiny_bridge(kind, torch.float64)
    call = calls_at(model, ids, [0])[0]
    x = call.resid_pre[None].clone().requires_grad_()
    out = call.run(x)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    (gradient,) = torch.autograd.grad((out * weight).sum(), x)
    step = torch.zeros_like(x)
    step[0, 2, 3] = 1e-3
    with torch.no_grad():
        difference = ((call.run(x + step) - call.run(x - step)) * weight).sum() / 2e-3
    torch.testing.assert_close(gradient[0, 2, 3], difference, rtol=1e-3, atol=1e-3)


def test_nothing_left_after_success(model: Any, ids: torch.Tensor) -> None:
    before, kept = hooks_on(model), state(model)
    lig_lens.attribute(model, ids, layers=0, progress=False)
    assert (hooks_on(model), state(model)) == (before, kept)


@pytest.mark.parametrize("error", [RuntimeError("inside a hook"), KeyboardInterrupt()])
@pytest.mark.parametrize("when", [1, 3, 6])
def test_nothing_left_after_a_failure(model: Any, ids: torch.Tensor, error: BaseException, when: int) -> None:
    before, kept = hooks_on(model), state(model)
    calls = 0

    def fail(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == when:
            raise error

    # A norm after attention runs with the whole block as well as with attention left out.
    norm = next(model.blocks[0]._modules[name] for name in ("ln2", "ln1") if name in model.blocks[0]._modules)
    handle = norm.register_forward_hook(fail)
    try:
        with pytest.raises(type(error)):
            lig_lens.attribute(model, ids, layers=0, progress=False)
    finally:
        handle.remove()
    assert calls == when
    assert (hooks_on(model), state(model)) == (before, kept)
    assert "forward" not in model.blocks[0].attn.__dict__


def test_half_precision_weights_come_back(ids: torch.Tensor) -> None:
    model = tiny_bridge("llama", torch.bfloat16)
    kept = state(model)
    lig_lens.attribute(model, ids, layers=1, maps="attn", progress=False)
    assert state(model) == kept and model.cfg.dtype == torch.bfloat16


def test_what_hooks_show_is_not_kept() -> None:
    # Of all blocks together it may not fit into memory.
    alive: list[weakref.ref[Seen]] = []

    def visit(call: BlockCall) -> int:
        gone = sum(seen() is None for seen in alive)
        assert call.seen is not None
        alive.append(weakref.ref(call.seen))
        return gone

    model = tiny_bridge("llama")
    gone = record_calls(stack_of(model), inputs_of(model, [5, 12, 30]), [0, 1], visit).visited
    assert gone == {0: 0, 1: 1} and all(seen() is None for seen in alive)
