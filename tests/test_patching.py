"""Interventions against TransformerLens' own, and against hooks on the pattern."""

import pytest
import torch
from tiny_hooked import HOOKED_KINDS, has_hooked_transformer, tiny_hooked
from tiny_models import KINDS, N_LAYERS, fresh_bridge
from tiny_models import compatible_bridge as compatible
from torch import Tensor

import lig_lens
from lig_lens import patching

CLEAN, CORRUPTED = [5, 12, 30, 7, 22], [5, 12, 11, 9, 22]


def curved(logits: Tensor) -> Tensor:
    return logits[0, -1].log_softmax(-1)[3] + 0.1 * logits[0, 2, 7] * logits[0, -2, 9]


def value(model, ids=CLEAN, hooks=()) -> float:
    with torch.no_grad():
        return float(curved(model.run_with_hooks(torch.tensor([ids]), fwd_hooks=list(hooks))))


def models(kind: str):
    yield compatible(kind)
    if has_hooked_transformer() and kind in HOOKED_KINDS and kind != "bert":
        yield tiny_hooked(kind)


@pytest.mark.parametrize("noising", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox"])
def test_equals_transformer_lens(kind: str, noising: bool):
    from transformer_lens import patching as theirs

    for model in models(kind):
        source, into = (CORRUPTED, CLEAN) if noising else (CLEAN, CORRUPTED)
        _, cache = model.run_with_cache(torch.tensor([source]))
        sign, before = (-1, value(model, into)) if noising else (1, value(model, into))
        ways = {"hook_z": theirs.get_act_patch_attn_head_out_by_pos, "resid_pre": theirs.get_act_patch_resid_pre}
        for at, way in ways.items():
            ours = patching.patch(model, CLEAN, CORRUPTED, curved, at=at, noising=noising, progress=False)
            expected = sign * (way(model, torch.tensor([into]), cache, curved) - before)
            if at == "hook_z":
                expected = expected.transpose(1, 2)  # theirs is [layer, pos, head]
            torch.testing.assert_close(ours.values, expected.cpu().float(), rtol=1e-3, atol=1e-4)
            assert ours.reference == pytest.approx(before, abs=1e-4)


def test_all_positions_of_a_head_at_once():
    from transformer_lens import patching as theirs

    model = compatible("llama")
    _, cache = model.run_with_cache(torch.tensor([CLEAN]))
    ours = patching.patch(model, CLEAN, CORRUPTED, curved, each_position=False, progress=False)
    expected = theirs.get_act_patch_attn_head_out_all_pos(model, torch.tensor([CORRUPTED]), cache, curved)
    assert ours.on == "heads"
    torch.testing.assert_close(ours.values, expected - value(model, CORRUPTED), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_and_residuals_by_hooks(kind: str):
    model = compatible(kind)
    boundaries = lig_lens.describe_boundaries(model)
    _, cache = model.run_with_cache(torch.tensor([CLEAN]))
    for at in ("hook_z", "resid_pre"):
        ours = patching.patch(model, CLEAN, CORRUPTED, curved, at=at, progress=False)
        for layer, pos, head in ((0, 2, 1), (1, 4, 0), (1, 2, 2)):
            name = getattr(boundaries[layer], at)

            def put(now, hook, name=name, pos=pos, head=head, at=at):
                now, wanted = now.clone(), cache[name].reshape(now.shape)
                if at == "hook_z":
                    heads = [x.reshape(*now.shape[:2], boundaries[0].n_heads, -1) for x in (now, wanted)]
                    heads[0][:, pos, head] = heads[1][:, pos, head]
                    return heads[0].reshape(now.shape)
                now[:, pos] = wanted[:, pos]
                return now

            index = (layer, head, pos) if at == "hook_z" else (layer, pos)
            expected = value(model, CORRUPTED, [(name, put)]) - value(model, CORRUPTED)
            assert float(ours.values[index]) == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "gemma2", "gemma3"])
def test_resid_mid_restores_everything_when_all_of_it_is_clean(kind: str):
    # The rest of the model sees resid_mid only: position by position it is a sum of steps that ends at the clean value.
    model = compatible(kind)
    ours = patching.patch(model, CLEAN, CORRUPTED, curved, at="resid_mid", layers=N_LAYERS - 1, progress=False)
    last = lambda logits: logits[0, -1, 3]  # noqa: E731
    at_last = patching.patch(model, CLEAN, CORRUPTED, last, at="resid_mid", layers=N_LAYERS - 1, progress=False)
    with torch.no_grad():
        clean, corrupted = (float(last(model(torch.tensor([ids])))) for ids in (CLEAN, CORRUPTED))
    # In the last block nothing mixes positions any more.
    assert float(at_last.values[0, -1]) == pytest.approx(clean - corrupted, rel=1e-3, abs=1e-4)
    assert float(at_last.values[0, :-1].abs().max()) <= 1e-4
    assert ours.on == "positions" and ours.values.shape == (1, len(CLEAN))


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox", "gemma2"])
def test_edges_by_hooks_on_the_pattern(kind: str, renormalise: bool):
    for model in models(kind):
        edges = [(0, 1, 2, 4), (0, 0, 1, 1), (1, 2, 0, 3), (1, 1, 4, 4), (1, 0, 0, 0)]
        ours = patching.knock_out(model, CLEAN, curved, edges=edges, renormalise=renormalise, progress=False)
        for layer, head, src, dst in edges:

            def cut(pattern, hook, head=head, src=src, dst=dst):
                pattern = pattern.clone()
                pattern[:, head, dst, src] = 0
                if renormalise and pattern[:, head, dst].sum() > 0:
                    pattern[:, head, dst] /= pattern[:, head, dst].sum(-1, keepdim=True)
                return pattern

            hooks = [(f"blocks.{layer}.attn.hook_pattern", cut)]
            expected = value(model) - value(model, hooks=hooks)
            if renormalise and (src, dst) == (0, 0):
                expected = 0.0
            assert float(ours.values[layer, head, src, dst]) == pytest.approx(expected, rel=2e-3, abs=1e-4)
        assert int((~ours.values.isnan()).sum()) == len(edges)


def test_edges_from_the_corrupted_run():
    model, edges = compatible("llama"), [(0, 1, 2, 4), (1, 3, 3, 3), (1, 0, 1, 4)]
    ours = patching.knock_out(model, CLEAN, curved, edges=edges, corrupted=CORRUPTED, progress=False)
    (_, cache), (_, other) = (model.run_with_cache(torch.tensor([ids])) for ids in (CLEAN, CORRUPTED))
    for layer, head, src, dst in edges:

        def put(z, hook, layer=layer, head=head, src=src, dst=dst):
            z = z.clone()
            for sign, run in ((-1, cache), (1, other)):
                values = run[f"blocks.{layer}.attn.hook_v"].reshape(len(CLEAN), -1, z.shape[-1])
                pattern = run[f"blocks.{layer}.attn.hook_pattern"]
                z[0, dst, head] += sign * pattern[0, head, dst, src] * values[src, head // 2]
            return z

        expected = value(model) - value(model, hooks=[(f"blocks.{layer}.attn.hook_z", put)])
        assert float(ours.values[layer, head, src, dst]) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    with pytest.raises(lig_lens.InputError, match="renormalise=True goes with knock-outs"):
        patching.knock_out(model, CLEAN, curved, corrupted=CORRUPTED, renormalise=True, progress=False)


def test_layers_of_edges_count_from_the_end_too():
    model = compatible("gpt2")
    one, other = (patching.knock_out(model, CLEAN, curved, edges=[(n, 0, 1, 3)], progress=False) for n in (1, -1))
    assert one.layers == other.layers == (1,)
    torch.testing.assert_close(one.values, other.values, equal_nan=True)


def test_an_edge_whose_other_run_cannot_be_read():
    model = fresh_bridge("gpt2")
    bent = lambda _m, _i, z: 1.01 * z if seen[-1][0, 2] == CORRUPTED[2] else z  # noqa: E731
    seen: list[Tensor] = []
    handles = [
        model.embed.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0])),
        model.blocks[1].attn.o.hook_in.register_forward_hook(bent),
    ]
    try:
        with pytest.raises(lig_lens.InputError, match="cannot be knocked out"):
            patching.knock_out(model, CLEAN, curved, edges=[(1, 0, 1, 3)], corrupted=CORRUPTED, progress=False)
    finally:
        for handle in handles:
            handle.remove()


def test_a_metric_without_a_gradient_can_be_patched():
    ours = patching.patch(
        compatible("gpt2"), CLEAN, CORRUPTED, lambda x: (x[0, -1].argmax() == 3).float(), progress=False
    )
    assert set(ours.values.unique().tolist()) <= {-1.0, 0.0, 1.0}


def test_all_edges_that_attention_can_see():
    ours = patching.knock_out(compatible("gpt2"), CLEAN, curved, progress=False)
    seen = torch.ones(len(CLEAN), len(CLEAN), dtype=torch.bool).triu()  # [src, dst]
    assert torch.equal(~ours.values.isnan(), seen.expand_as(ours.values))
    some = patching.knock_out(compatible("gpt2"), CLEAN, curved, layers=1, max_batch_tokens=7, progress=False)
    torch.testing.assert_close(some.values[0], ours.values[1], equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by", patching.ABLATIONS)
def test_ablation_by_hooks(by: str):
    model, others = compatible("llama"), [[8, 31, 12, 25, 6], [9, 3, 3, 4, 30]]
    ours = patching.ablate(model, CLEAN, curved, others, by=by, progress=False)
    zs = [model.run_with_cache(torch.tensor([ids]))[1] for ids in others]
    for layer, head in ((0, 1), (1, 3)):
        name = f"blocks.{layer}.attn.hook_z"
        put_in = [torch.stack([z[name] for z in zs]).mean(0)] if by == "mean" else [z[name] for z in zs]
        changed = []
        for new in put_in:

            def put(now, hook, head=head, new=new):
                now = now.clone()
                now[:, :, head] = new[:, :, head]
                return now

            changed.append(value(model, hooks=[(name, put)]))
        assert float(ours.values[layer, head]) == pytest.approx(
            value(model) - sum(changed) / len(changed), rel=1e-3, abs=1e-4
        )


def test_effects_say_what_is_subtracted_from_what():
    model, options = compatible("gpt2"), {"progress": False, "layers": [1]}
    clean, corrupted = value(model), value(model, CORRUPTED)
    one = {"edges": [(1, 0, 2, 4)], "progress": False}
    for effects, measures, before in (
        (patching.patch(model, CLEAN, CORRUPTED, curved, **options), "metric gained: patched - corrupted", corrupted),
        (
            patching.patch(model, CLEAN, CORRUPTED, curved, noising=True, **options),
            "metric lost: clean - patched",
            clean,
        ),
        (patching.knock_out(model, CLEAN, curved, **one), "metric lost: clean - knocked out", clean),
        (
            patching.knock_out(model, CLEAN, curved, corrupted=CORRUPTED, **one),
            "metric lost: clean - patched",
            clean,
        ),
        (patching.ablate(model, CLEAN, curved, [CORRUPTED], **options), "metric lost: clean - ablated", clean),
    ):
        # That the values are this difference is what the tests above hold against hooks.
        assert effects.measures == measures and effects.reference == pytest.approx(before, abs=1e-4)
    found = lig_lens.scores(model, CLEAN, CORRUPTED, curved, layers=[1])
    assert {score.measures for score in found.values()} == {"score"}


def test_under_inference_mode():
    model = compatible("gpt2")
    expected = patching.patch(model, CLEAN, CORRUPTED, curved, progress=False)
    with torch.inference_mode():
        ours = patching.patch(model, CLEAN, CORRUPTED, curved, progress=False)
        scores = lig_lens.scores(model, CLEAN, CORRUPTED, curved)
    assert torch.equal(ours.values, expected.values) and len(scores) == 4


def test_model_is_left_as_it_was():
    model = compatible("gpt2")
    before = value(model)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    patching.patch(model, CLEAN, CORRUPTED, curved, progress=False)
    patching.knock_out(model, CLEAN, curved, edges=[(0, 0, 0, 1)], progress=False)
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert value(model) == before


@pytest.mark.parametrize(
    "run, message",
    [
        (lambda m: patching.patch(m, CLEAN, CORRUPTED[:4], curved), "4 tokens, the prompt 5.*part at position"),
        (lambda m: patching.patch(m, CLEAN, CORRUPTED, curved, at="hook_q"), "Unknown node 'hook_q'"),
        (lambda m: patching.patch(m, CLEAN, CORRUPTED, curved, at="resid_pre", each_position=False), "goes with"),
        (lambda m: patching.patch(m, CLEAN, CORRUPTED, lambda x: x[0]), r"gave shape \[5, 40\]"),
        (lambda m: patching.patch(m, CLEAN, CORRUPTED, lambda x: x.sum() * torch.inf), "gave (-?inf|nan)"),
        (
            lambda m: patching.knock_out(m, CLEAN, curved, edges=[(0, 0, 4, 1)]),
            r"\(0, 0, 4, 1\) does not exist.*causal",
        ),
        (lambda m: patching.knock_out(m, CLEAN, curved, edges=[(0, 9, 0, 1)]), "heads 0 to 2"),
        (lambda m: patching.knock_out(m, CLEAN, curved, edges=[(0, 1)]), "four whole numbers"),
        (lambda m: patching.knock_out(m, CLEAN, curved, edges=[(0.9, 0.7, 0.5, 1.9)]), "four whole numbers"),
        (lambda m: patching.knock_out(m, CLEAN, curved, edges=[(1, 0, 0, 1)], layers=0), "name all of them"),
        (lambda m: patching.patch(m, CLEAN, CORRUPTED, curved, max_batch_tokens=0), "max_batch_tokens=0"),
        (lambda m: patching.knock_out(m, CLEAN, curved, edges=[]), "edges is empty"),
        (lambda m: patching.knock_out(m, CLEAN, curved, edges=[(7, 0, 0, 0)]), "layer 7 is out of range"),
        (lambda m: patching.ablate(m, CLEAN, curved, [CLEAN], by="zero"), "Unknown ablation 'zero'"),
        (lambda m: patching.ablate(m, CLEAN, curved, [CLEAN, CLEAN[:3]]), "3 tokens, the prompt 5"),
        (lambda m: patching.patch(m, [CLEAN, CLEAN], [CORRUPTED, CORRUPTED], curved), "one pair at a time"),
    ],
)
def test_bad_input(run, message: str):
    with pytest.raises(lig_lens.InputError, match=message):
        run(compatible("gpt2"))


def test_a_layout_without_resid_mid():
    with pytest.raises(lig_lens.InputError, match=r"parallel.*has no resid_mid.*use at='resid_pre' or 'hook_z'"):
        patching.patch(compatible("neox"), CLEAN, CORRUPTED, curved, at="resid_mid", progress=False)


def test_a_pattern_that_is_not_what_makes_z():
    model = fresh_bridge("gpt2")
    handle = model.blocks[1].attn.o.hook_in.register_forward_hook(lambda _m, _i, z: 1.5 * z)
    try:
        with pytest.raises(lig_lens.InputError, match=r"cannot be knocked out. Heads and residual stream can still"):
            patching.knock_out(model, CLEAN, curved, progress=False)
        assert patching.patch(model, CLEAN, CORRUPTED, curved, progress=False).values.abs().max() > 0
    finally:
        handle.remove()
