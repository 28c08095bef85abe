"""What is new is a class: interventions and scores of one's own, and what a run costs."""

from collections.abc import Sequence

import pytest
import torch
from tiny_models import N_LAYERS
from tiny_models import compatible_bridge as bridge
from torch import Tensor

import lig_lens
from lig_lens import patching
from lig_lens.blocks.values import Values
from lig_lens.interventions import ABLATED_BY, NODES, SCORED_BY
from lig_lens.interventions.ablations import Ablation
from lig_lens.interventions.intervention import Change, Intervention, Trials, copies
from lig_lens.interventions.runner import intervene
from lig_lens.interventions.scores import SCORES
from lig_lens.interventions.scores.score import Score, Side
from lig_lens.registry import Entry

CLEAN, CORRUPTED = [5, 12, 30, 7, 22], [5, 12, 11, 9, 22]


def curved(logits: Tensor) -> Tensor:
    return logits[0, -1].log_softmax(-1)[3] + 0.1 * logits[0, 2, 7] * logits[0, -2, 9]


def value(model, hooks=()) -> float:
    with torch.no_grad():
        return float(curved(model.run_with_hooks(torch.tensor([CLEAN]), fwd_hooks=list(hooks))))


class Doubled(Intervention):
    """A position's residual vector, and one head's output there, are twice as long."""

    on, done, name = "heads_by_pos", "doubled", "doubling"

    def trials(self, into: Values, others: Sequence[Values]) -> Trials:
        z, resid = into.heads.z, into.resid_pre

        def make(numbers: Tensor) -> Change:
            (longer, run), (heads, _) = copies(resid, numbers), copies(z, numbers)
            head, pos = numbers // len(z), numbers % len(z)
            longer[run, pos] *= 2
            heads[run, pos, head] *= 2
            return Change(resid=longer, z=heads)

        return Trials((into.heads.n_heads, len(z)), make)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox"])
def test_an_intervention_of_ones_own_is_what_hooks_do(kind: str):
    model = bridge(kind)
    ours = intervene(model, [CLEAN], curved, Doubled(), max_batch_tokens=12, progress=False)
    assert ours.axes == ("layer", "head", "pos") and ours.name == "doubling"
    assert ours.measures == "metric lost: clean - doubled" and ours.settings == {"prompt": CLEAN, "others": []}
    names = [(b.resid_pre, b.hook_z) for b in lig_lens.describe_boundaries(model)]
    _, cache = model.run_with_cache(torch.tensor([CLEAN]))
    for layer, head, pos in ((0, 1, 2), (1, 0, 4), (1, 2, 0)):
        resid, hook_z = names[layer]

        def longer(now, hook, pos=pos):
            now = now.clone()
            now[:, pos] *= 2
            return now

        def put(now, hook, head=head, pos=pos):
            # Of the run itself: the other heads stay as they were, whatever enters the block.
            heads = cache[hook.name].clone().reshape(1, len(CLEAN), ours.values.shape[1], -1)
            heads[:, pos, head] *= 2
            return heads.reshape(now.shape)

        expected = value(model) - value(model, [(resid, longer), (hook_z, put)])
        assert float(ours.values[layer, head, pos]) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_a_registered_ablation_and_a_registered_score():
    class Zero(Ablation):
        by = "zero"

        def trials(self, into: Values, others: Sequence[Values]) -> Trials:
            def make(numbers: Tensor) -> Change:
                changed, run = copies(into.heads.z, numbers)
                changed[run, :, numbers] = 0
                return Change(z=changed)

            return Trials((into.heads.n_heads,), make)

    class Ones(Score):
        def edges(self, clean: Side, corrupted: Side) -> Tensor:
            return torch.ones_like(clean.messages.pattern)

    model = bridge("llama")
    ABLATED_BY.add("zero", Entry(Zero))
    SCORED_BY.add("ones", Entry(Ones))
    try:
        ours = patching.ablate(model, CLEAN, curved, CORRUPTED, by="zero", progress=False)
        found = lig_lens.scores(model, CLEAN, CORRUPTED, curved, on="heads_by_pos", which=["ones"])["ones"]
    finally:
        ABLATED_BY.remove("zero")
        SCORED_BY.remove("ones")
    assert ours.name == "zero ablation" and torch.equal(found.values, torch.full_like(found.values, len(CLEAN)))

    def silent(now, hook):
        now = now.clone()
        now[:, :, 2] = 0
        return now

    expected = value(model) - value(model, [("blocks.1.attn.hook_z", silent)])
    assert float(ours.values[1, 2]) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_names_that_users_give():
    assert NODES.names() == ("hook_z", "resid_pre", "resid_mid")
    assert patching.ABLATIONS == ABLATED_BY.names() == ("mean", "resample")
    assert SCORES == SCORED_BY.names() and SCORES[0] == "attention" and len(SCORES) == 4


def runs_of(model, act) -> list[int]:
    """Batch of every run that reached the unembedding."""
    seen: list[int] = []
    handle = model.unembed.register_forward_hook(lambda _m, _i, output: seen.append(len(output)))
    try:
        act()
    finally:
        handle.remove()
    return seen


@pytest.mark.parametrize("noising", [False, True])
def test_a_prompt_is_run_once(noising: bool):
    model = bridge("gpt2")
    act = lambda: patching.patch(model, CLEAN, CORRUPTED, curved, at="resid_pre", noising=noising, progress=False)  # noqa: E731
    act()  # what is known of the blocks does not depend on the prompt
    # Values that are put in need no logits; what is measured runs all positions of a block at once.
    whole = [1] if noising else [1, 1]
    assert runs_of(model, act) == whole + [len(CLEAN)] * N_LAYERS


def test_forward_passes_of_patching_and_scores():
    model = bridge("gpt2")
    calls: list[int] = []
    handle = model.blocks[0].attn.register_forward_pre_hook(lambda _m, args: calls.append(1))
    try:
        patching.patch(model, CLEAN, CORRUPTED, curved, layers=[1], progress=False)
        # Attention of block 0 runs for the two prompts, and for none of the runs that differ from block 1 on.
        assert len(calls) == 2
        calls.clear()
        lig_lens.scores(model, CLEAN, CORRUPTED, curved, which=["attention"], layers=[1])
        assert len(calls) == 2
    finally:
        handle.remove()
    ran = runs_of(model, lambda: lig_lens.scores(model, CLEAN, CORRUPTED, curved, which=["gradient_pattern"]))
    assert ran == [1, 1, 1]  # a gradient is one more pass, of the prompt that it is asked of


def test_only_scores_that_take_a_gradient_need_one():
    model, step = bridge("gpt2"), lambda logits: (logits[0, -1].argmax() == 3).float()
    assert len(lig_lens.scores(model, CLEAN, CORRUPTED, step, which=["attention", "attention_value_norm"])) == 2
    with pytest.raises(lig_lens.InputError, match="has no gradient"):
        lig_lens.scores(model, CLEAN, CORRUPTED, step)


def test_it_loads_no_torch_until_something_is_patched():
    import subprocess
    import sys

    code = "import sys, lig_lens.interventions as room\nassert 'torch' not in sys.modules\nroom.patching.patch"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
