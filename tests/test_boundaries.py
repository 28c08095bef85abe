"""Nodes are found and checked on the model at hand; what does not fit is an error, never a wrong number."""

from typing import Any

import pytest
import torch
from at_blocks import values_at
from tiny_hooked import has_hooked_transformer, tiny_hooked
from tiny_models import KINDS, LAYOUTS, fresh_bridge, tiny_bridge

import lig_lens
from lig_lens.errors import BoundaryError, InputError, NonFiniteError


@pytest.fixture
def gpt2() -> Any:
    """A model that a test may break."""
    return fresh_bridge("gpt2")


@pytest.mark.parametrize("kind", KINDS)
def test_layout_and_nodes(kind: str) -> None:
    model = tiny_bridge(kind)
    blocks = lig_lens.describe_boundaries(model)
    assert [block.layer for block in blocks] == [0, 1]
    for block in blocks:
        assert block.layout == LAYOUTS[kind]
        assert block.n_heads == model.cfg.n_heads and block.d_head == model.cfg.d_head
        assert block.n_key_value_heads == (model.cfg.n_key_value_heads or model.cfg.n_heads)
        assert (block.resid_mid is None) == (LAYOUTS[kind] == "parallel")
        for name in (block.resid_pre, block.hook_z, block.resid_post):
            assert name in model.hook_dict


@pytest.mark.parametrize("kind", KINDS)
def test_named_hooks_carry_the_nodes(kind: str, ids: torch.Tensor) -> None:
    model = tiny_bridge(kind)
    values = values_at(model, ids, [1])[1]
    heads = values.heads
    _, cache = model.run_with_cache(ids[None])
    block = values.block.boundaries
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(cache[block.resid_pre][0], values.resid_pre, **close)
    torch.testing.assert_close(cache[block.hook_z][0], heads.z, **close)
    torch.testing.assert_close(cache[block.resid_post][0], values.resid_post, **close)
    if kind in ("bert", "gpt2", "llama"):
        middle = values.resid_pre + heads.attn_out(heads.z, 1.0)
        torch.testing.assert_close(cache[block.resid_mid][0], middle, **close)


def test_bert_alias_of_resid_mid_is_not_taken_at_its_word() -> None:
    # On a BERT bridge hook_resid_mid is the sum entering the second LayerNorm.
    assert all(block.resid_mid.endswith("ln1.hook_in") for block in lig_lens.describe_boundaries(tiny_bridge("bert")))


def test_familiar_names_after_compatibility_mode(gpt2: Any) -> None:
    gpt2.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    block = lig_lens.describe_boundaries(gpt2)[1]
    assert (block.resid_pre, block.hook_z) == ("blocks.1.hook_resid_pre", "blocks.1.attn.hook_z")
    assert (block.resid_mid, block.resid_post) == ("blocks.1.hook_resid_mid", "blocks.1.hook_resid_post")


def test_wrong_hook_is_an_error(gpt2: Any, ids: torch.Tensor) -> None:
    # A hook that shows something else than the head outputs before W_O.
    gpt2.blocks[1].attn.o.hook_out.register_forward_hook(lambda _m, _i, out: 1.5 * out)
    with pytest.raises(BoundaryError, match=r"Block 1: hook_z times W_O plus b_O misses .* of it"):
        lig_lens.attribute(gpt2, ids, progress=False)


@pytest.mark.parametrize("step", [1.0, 2e-3])
def test_block_that_uses_hidden_input_is_an_error(gpt2: Any, ids: torch.Tensor, step: float) -> None:
    calls = 0

    def drift(_module: Any, _inputs: Any, out: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return out * (1 + step * calls)

    gpt2.blocks[0].mlp.hook_out.register_forward_hook(drift)
    with pytest.raises(BoundaryError, match="Running block 0 alone differs from the full model"):
        lig_lens.attribute(gpt2, ids, progress=False)


def mean_of_positions(out: torch.Tensor) -> torch.Tensor:
    return out + out.mean(1, keepdim=True)


def position_before(out: torch.Tensor) -> torch.Tensor:
    return out + out.roll(1, 1)


def last_position_scaled(out: torch.Tensor) -> torch.Tensor:
    return torch.cat([out[:, :-1], 5 * out[:, -1:]], 1)


@pytest.mark.parametrize("edit", [mean_of_positions, position_before, last_position_scaled])
def test_tail_that_mixes_or_tells_positions_apart(gpt2: Any, ids: torch.Tensor, edit: Any) -> None:
    gpt2.blocks[0].mlp.hook_out.register_forward_hook(lambda _m, _i, out: edit(out))
    with pytest.raises(BoundaryError, match=r"Block 0: after attention it mixes positions .* use maps=\('block',\)"):
        lig_lens.attribute(gpt2, ids, progress=False)
    # The advice works: the whole block needs no layout.
    flow = lig_lens.attribute(gpt2, ids, maps="block", layers=0, progress=False)
    assert flow.layouts == ("block_only",) and bool(flow.converged["block"].all())


@pytest.mark.parametrize("name", ["mlp.out", "attn.o", "attn.q", "ln1"])
def test_nan_in_weights_names_block_and_weight(gpt2: Any, ids: torch.Tensor, name: str) -> None:
    module = gpt2.blocks[1].get_submodule(name)
    next(module.parameters()).data[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"NaN or infinite values in the weight '.*' of block 1: reload the model"):
        lig_lens.attribute(gpt2, ids, progress=False)


@pytest.mark.skipif(not has_hooked_transformer(), reason="TransformerLens 4 has no HookedTransformer; CI runs 3.9 too")
@pytest.mark.parametrize("name", ["W_Q", "b_K", "W_O"])
def test_nan_in_a_hooked_transformer_is_seen_too(ids: torch.Tensor, name: str) -> None:
    # It turns NaN patterns into 0, so no activation shows them.
    model = tiny_hooked.__wrapped__("gpt2")
    getattr(model.blocks[1].attn, name).data.view(-1)[0] = float("nan")
    with pytest.raises(NonFiniteError, match=f"in the weight 'attn.{name}' of block 1"):
        lig_lens.attribute(model, ids, maps="mlp", progress=False)


def test_nan_before_the_block_is_seen_in_resid_pre(gpt2: Any, ids: torch.Tensor) -> None:
    gpt2.embed.weight.data[int(ids[2])] = float("inf")
    with pytest.raises(NonFiniteError, match=r"at resid_pre of block 0: check the weights before it, and the dtype"):
        lig_lens.attribute(gpt2, ids, progress=False)


def test_models_that_cannot_be_described() -> None:
    with pytest.raises(InputError, match="Linear is not a hooked model"):
        lig_lens.describe_boundaries(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"call model.eval\(\)|Call model.eval\(\)"):
        lig_lens.describe_boundaries(fresh_bridge("gpt2").train())


class _TokenMixer(torch.nn.Module):
    """A block without attention: each position adds a map of the mean of all."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(d_model, d_model)

    def forward(self, resid_pre: torch.Tensor, **_: Any) -> torch.Tensor:
        return resid_pre + torch.tanh(self.mix(resid_pre.mean(1, keepdim=True)))


def test_block_without_attention_has_the_block_map_only(ids: torch.Tensor) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.cfg = type("Cfg", (), {"n_layers": 1, "d_model": 8, "d_vocab": 40, "n_ctx": 32, "eps": 1e-5})()
            self.cfg.dtype, self.cfg.device, self.tokenizer, self.hook_dict = torch.float32, "cpu", None, {}
            self.embed = torch.nn.Embedding(40, 8)
            self.blocks = torch.nn.ModuleList([_TokenMixer(8)])

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.blocks[0](self.embed(tokens))

    model = Model().eval()
    assert lig_lens.describe_boundaries(model)[0].layout == "block_only"
    flow = lig_lens.attribute(model, ids, maps="block", block_baseline="zero", progress=False)
    assert flow.layouts == ("block_only",) and bool(flow.converged["block"].all())
    with pytest.raises(InputError, match=r"Block 0 has no attention .* no 'attn' map: use maps=\('block',\)"):
        lig_lens.attribute(model, ids, progress=False)


def test_a_block_that_serves_several_layers_is_refused(gpt2: Any, ids: torch.Tensor) -> None:
    gpt2.blocks[1] = gpt2.blocks[0]
    with pytest.raises(BoundaryError, match=r"one block for several of its 2 layers.*give each layer a copy"):
        lig_lens.attribute(gpt2, ids, progress=False)


def test_an_edit_of_one_position_is_seen_in_a_long_prompt() -> None:
    model, ids = fresh_bridge("llama"), list(range(5, 36))

    def zero_the_middle(_module, _inputs, output):
        output = output.clone()
        output[:, 15] = 0
        return output

    handle = model.blocks[1].attn.o.hook_out.register_forward_hook(zero_the_middle)
    try:
        with pytest.raises(BoundaryError, match=r"misses the attention output"):
            lig_lens.attribute(model, ids, maps="mlp", layers=1, progress=False)
    finally:
        handle.remove()


def test_an_edit_beside_a_massive_position_is_seen() -> None:
    model, ids = fresh_bridge("llama"), [5, 12, 30, 7, 22, 9, 17]
    # One token is a thousand times larger than the others, and what a hook does to one of these is small beside it.
    model.embed.original_component.weight.data[ids[0]] *= 1e4

    def push(_module, _inputs, output):
        output = output.clone()
        output[:, 3] += 0.5
        return output

    handle = model.blocks[1].mlp.hook_out.register_forward_hook(push)
    try:
        with pytest.raises(BoundaryError, match=r"treats them differently"):
            lig_lens.attribute(model, ids, maps="mlp", layers=1, progress=False)
    finally:
        handle.remove()
