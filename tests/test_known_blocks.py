"""Blocks are found once per model, found again when they change, and never keep a model alive."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from at_blocks import values_at
from tiny_models import KINDS, fresh_bridge, tiny_bridge

import lig_lens
from lig_lens.blocks import formula_fit, known

FIRST, SECOND, LONGER = [5, 12, 30, 7, 22, 39], [8, 31, 12, 25, 6, 17], [9, 8, 7, 30, 11, 12, 13, 14, 4, 20]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Numbers of the blocks that were looked into."""
    layers: list[int] = []
    find = known.find_block

    def noting(call: Any, *arguments: Any, **options: Any) -> Any:
        layers.append(call.layer)
        return find(call, *arguments, **options)

    monkeypatch.setattr(known, "find_block", noting)
    yield layers


def fresh(kind: str) -> Any:
    model = fresh_bridge(kind)
    model(torch.tensor([FIRST]))  # a bridge wires some hooks of its own in its first forward pass
    return model


def attn(model: Any, ids: list[int], **options: Any) -> torch.Tensor:
    flow = lig_lens.attribute(model, ids, maps="attn", attn_baseline="zero", progress=False, **options)
    return flow.attn


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_prompt_pays_for_its_own_values_alone(kind: str, found: list[int]) -> None:
    model = fresh(kind)
    attn(model, FIRST)
    assert found == [0, 1]
    warm = [attn(model, ids) for ids in (SECOND, LONGER, SECOND[:2])]
    assert found == [0, 1]
    # The same numbers as from a model that has seen nothing before.
    for ids, seen in zip((SECOND, LONGER, SECOND[:2]), warm, strict=True):
        torch.testing.assert_close(seen, attn(fresh(kind), ids), rtol=1e-4, atol=1e-5)


def test_clean_and_corrupted_prompts_share_their_blocks(found: list[int]) -> None:
    lig_lens.attribute(fresh("llama"), FIRST, corrupted=SECOND, maps="attn", attn_baseline="corrupted", progress=False)
    assert found == [0, 1]


def test_what_is_kept_does_not_keep_the_model_alive() -> None:
    model = fresh("llama")
    attn(model, FIRST)
    blocks = [weakref.ref(block) for block in model.blocks]
    assert all(block() in known._KEPT for block in blocks)
    before = len(known._KEPT)
    del model
    gc.collect()
    assert [block() for block in blocks] == [None, None] and len(known._KEPT) == before - 2


def test_nothing_is_left_on_the_model() -> None:
    model = fresh("llama")
    before = [set(vars(module)) for module in model.modules()]
    attn(model, FIRST)
    assert [set(vars(module)) for module in model.modules()] == before


def scale_weights_in_place(model: Any) -> None:
    # `.data` is not seen by torch's own count of changes.
    model.blocks[1].attn.q.original_component.weight.data.mul_(1.5)


def replace_weights(model: Any) -> None:
    parameter = next(model.blocks[1].attn.o.parameters())
    parameter.data = parameter.data * 0.5


def add_a_hook(model: Any) -> None:
    model.blocks[1].mlp.register_forward_hook(lambda _m, _i, out: 2 * out)


@pytest.mark.parametrize("change", [scale_weights_in_place, replace_weights, add_a_hook])
def test_a_block_that_changed_is_found_again(change: Any, found: list[int]) -> None:
    model, other = fresh("llama"), fresh("llama")
    attn(model, FIRST)
    for one in (model, other):
        change(one)
    found.clear()
    changed = attn(model, FIRST)
    assert found == [1]
    torch.testing.assert_close(changed, attn(other, FIRST), rtol=1e-4, atol=1e-5)


def test_a_hook_that_does_something_else_each_time_is_seen(found: list[int]) -> None:
    # Steering by a number that the hook reads anew: the same hook, the same weights.
    model, other, strength = fresh("llama"), fresh("llama"), [0.0]
    for one in (model, other):
        one.blocks[1].attn.k.hook_out.register_forward_hook(lambda _m, _i, out: out + strength[0])
    attn(model, FIRST)
    strength[0] = 3.0
    found.clear()
    steered = attn(model, FIRST)
    assert found == [1]
    torch.testing.assert_close(steered, attn(other, FIRST), rtol=1e-4, atol=1e-5)


def test_heads_that_change_places_are_seen() -> None:
    # Sums of weights stay what they are.
    model, other = fresh("bert"), fresh("bert")
    for one in (model, other):
        for part in (one.blocks[1].attn.q, one.blocks[1].attn.k):
            part.original_component.bias.data.normal_(generator=torch.Generator().manual_seed(1))
    attn(model, FIRST)
    for one in (model, other):
        for part in (one.blocks[1].attn.q, one.blocks[1].attn.k):
            linear = part.original_component
            linear.weight.data, linear.bias.data = linear.weight.data.flip(0), linear.bias.data.flip(0)
    torch.testing.assert_close(attn(model, FIRST), attn(other, FIRST), rtol=1e-4, atol=1e-5)


def test_what_one_prompt_could_not_tell_the_next_one_may(monkeypatch: pytest.MonkeyPatch, found: list[int]) -> None:
    model, fit = fresh("llama"), formula_fit.fit_scores
    monkeypatch.setattr(formula_fit, "fit_scores", lambda *_: None)
    first = lig_lens.attribute(model, FIRST, maps="attn", progress=False)
    monkeypatch.setattr(formula_fit, "fit_scores", fit)
    second = lig_lens.attribute(model, SECOND, maps="attn", progress=False)
    assert (set(first.engines["attn"]), set(second.engines["attn"])) == ({"hooks"}, {"closed_form"})
    assert found == [0, 1, 0, 1]


def test_what_was_found_on_few_positions_does_not_stand_for_many(found: list[int]) -> None:
    model = fresh("llama")
    attn(model, [5, 12])
    attn(model, [7, 9])
    assert found == [0, 1]
    attn(model, FIRST)
    assert found == [0, 1, 0, 1]
    attn(model, [5])
    assert found == [0, 1, 0, 1]


def test_a_window_that_a_short_prompt_does_not_show_is_found_on_a_long_one(found: list[int]) -> None:
    from test_coverage import windowed

    model = windowed.__wrapped__(2, 5, torch.float32)
    model(torch.tensor([FIRST]))
    short = values_at(model, FIRST[:4], [1])[1]
    assert short.heads.formula is not None and found == [1]
    found.clear()
    long = values_at(model, LONGER, [1])[1]
    assert found == [1] and long.heads.formula is not None
    assert int(torch.isfinite(long.heads.formula.bias[0, -1]).sum()) == 5
    # What is known of the long one serves short ones too.
    found.clear()
    again = values_at(model, FIRST[:4], [1])[1]
    assert found == [] and torch.equal(again.heads.formula.bias, short.heads.formula.bias)


def test_a_metric_run_passes_through_the_model_once_per_prompt() -> None:
    model, pair = lig_lens.load_model("induction"), lig_lens.induction_pairs(1)[0]
    metric = lig_lens.logit_difference(pair.answer, pair.wrong)
    first_blocks = 0

    def count(_module: Any, _inputs: Any, _output: Any) -> None:
        nonlocal first_blocks
        first_blocks += 1

    def run(layer: int) -> int:
        nonlocal first_blocks
        first_blocks = 0
        lig_lens.attribute(
            model, pair.clean, corrupted=pair.corrupted, target=metric, layers=layer, max_nodes=8, tol=0.9,
            progress=False,
        )  # fmt: skip
        return first_blocks

    run(1)  # finds the blocks
    # Runs that start at block 1 do not pass through block 0's modules: what does is the two whole runs.
    handle = model.blocks[0].mlp.register_forward_hook(count)
    try:
        run(1)  # finds block 0 nowhere: it was not asked for
        assert run(1) == 2
    finally:
        handle.remove()


def test_half_precision_models_are_found_in_both_precisions(found: list[int]) -> None:
    model = tiny_bridge.__wrapped__("llama", torch.bfloat16)
    metric = lig_lens.logit_difference(9, 17)
    for _ in range(3):
        attn(model, FIRST)
        lig_lens.attribute(model, FIRST, corrupted=SECOND, target=metric, progress=False)
    assert sorted(found) in ([0, 0, 1, 1], [0, 0, 0, 1, 1, 1])  # the first run wires hooks
