"""The packaged model: its circuit is found by ablation, and LIG has to find the same heads and edges."""

import functools
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_hooked import has_hooked_transformer

import lig_lens
from lig_lens import patching
from lig_lens.inputs.induction import WORDS
from lig_lens.names import SPLITS

N_PAIRS = 12


@functools.cache
def model():
    return lig_lens.load_model("induction")


@functools.cache
def pairs():
    return lig_lens.induction_pairs(N_PAIRS)


def metric_of(pair) -> lig_lens.targets.metrics.Metric:
    return lig_lens.logit_difference(pair.answer, pair.wrong)


@functools.cache
def circuit() -> tuple[int, int]:
    """Heads without which it does not work: mean ablation, over all pairs."""
    others = [pair.clean for pair in pairs()]
    effects = [patching.ablate(model(), p.clean, metric_of(p), others, progress=False) for p in pairs()]
    mean = lig_lens.average(effects).mean.values
    for layer in range(2):
        first, second = mean[layer].sort(descending=True).values[:2]
        assert first > 4 * second  # one head stands out
    return int(mean[0].argmax()), int(mean[1].argmax())


@functools.cache
def flows(split: str = "source") -> list[lig_lens.Flow]:
    return [
        lig_lens.attribute(model(), p.clean, corrupted=p.corrupted, target=metric_of(p), split=split, progress=False)
        for p in pairs()
    ]


def true_edges(pair) -> set[tuple[int, int, int, int]]:
    previous, induction = circuit()
    return {(0, previous, *edge) for edge in pair.edges["previous"]} | {
        (1, induction, *edge) for edge in pair.edges["induction"]
    }


def precision(edges: list[list[tuple[int, int, int, int]]]) -> float:
    return sum(len(true_edges(p) & set(found)) / len(found) for p, found in zip(pairs(), edges, strict=True)) / N_PAIRS


def test_it_continues_what_was_repeated():
    for pair in pairs():
        for text, answer in ((pair.clean, pair.answer), (pair.corrupted, pair.wrong)):
            with torch.no_grad():
                token = int(model()(text)[0, -1].argmax())
            assert model().tokenizer.decode([token]).strip() == answer


def test_the_heads_look_where_such_heads_look():
    previous, induction = circuit()
    for pair in pairs():
        attention = lig_lens.scores(model(), pair.clean, pair.corrupted, metric_of(pair), which=["attention"])[
            "attention"
        ]
        back = attention.values[0, previous].diagonal(1)  # [src, dst], one to the left
        assert float(back.mean()) > 0.9
        # What a head of the second layer sees where A stands again is B.
        src, dst = pair.edges["induction"][0]
        assert float(attention.values[1, induction, src, dst]) > 0.8


def test_knock_outs_find_the_same_edges():
    previous, induction = circuit()
    for pair in pairs()[:3]:
        effects = patching.knock_out(model(), pair.clean, metric_of(pair), renormalise=True, progress=False)
        # Of the clean run: D was never asked for, so the edges that write A into B, and copy B, carry it.
        needed = {(0, previous, *pair.edges["previous"][0]), (1, induction, *pair.edges["induction"][0])}
        assert set(patching.top_edges(effects, 2)) == needed


def test_lig_ranks_the_known_heads_first():
    previous, induction = circuit()
    by_head = lig_lens.average(flows()).mean.attn.sum((2, 3))
    order = by_head.flatten().argsort(descending=True).tolist()
    assert set(order[:2]) == {previous, 4 + induction}
    for flow in flows():
        assert flow.attn.sum((2, 3)).argmax(1).tolist() == [previous, induction]
        assert flow.converged["attn"].all()


@pytest.mark.parametrize("split", SPLITS)
def test_lig_finds_the_known_edges(split: str):
    assert precision([patching.top_edges(flow, 4) for flow in flows(split)]) >= 0.95


def test_edges_are_foretold_as_their_messages_are_patched():
    found = []
    for pair, flow in zip(pairs(), flows("message"), strict=True):
        effects = patching.knock_out(model(), pair.clean, metric_of(pair), corrupted=pair.corrupted, progress=False)
        found.append(lig_lens.compare(flow, effects))
    assert statistics.mean(one.pearson for one in found) > 0.95
    assert statistics.mean(one.average_precision for one in found) > 0.95


def test_a_word_that_it_does_not_know_is_no_first_token():
    with pytest.raises(lig_lens.InputError, match=r"does not know: 'zebra'.*'<bos>'"):
        lig_lens.attribute(model(), "apple zebra bear", progress=False)
    assert lig_lens.attribute(model(), "apple <bos> bear", layers=0, progress=False).tokens[2] == "<bos>"


def test_pairs():
    for n_words in (5, 16, 40):
        for pair in lig_lens.induction_pairs(20, n_words, seed=n_words):
            clean, corrupted = pair.clean.split(), pair.corrupted.split()
            assert len(clean) == len(corrupted) == n_words and clean[-1] == corrupted[-1] and set(clean) <= set(WORDS)
            assert sum(a != b for a, b in zip(clean, corrupted, strict=True)) == 2
            # The first token stands before the words.
            tokens = ["", *clean]
            (a, b), (c, d) = pair.edges["previous"]
            assert tokens[a] == tokens[-1] and tokens[b] == pair.answer and tokens[d] == pair.wrong
            assert pair.edges["induction"] == ((b, n_words), (d, n_words)) and corrupted[c - 1] == tokens[a]
    assert lig_lens.induction_pairs(3) == lig_lens.induction_pairs(3) != lig_lens.induction_pairs(3, seed=1)
    with pytest.raises(lig_lens.InputError, match="n_words=4: give 5 to 63"):
        lig_lens.induction_pairs(1, 4)


@pytest.mark.skipif(not has_hooked_transformer(), reason="TransformerLens 4 has no HookedTransformer")
def test_both_generations_give_the_same():
    other = lig_lens.load_model("induction", hooked_transformer=True)
    pair = pairs()[0]
    ids = model().to_tokens(pair.clean)
    with torch.no_grad():
        torch.testing.assert_close(other(ids), model()(ids), rtol=1e-4, atol=1e-3)
    assert torch.equal(other.to_tokens(pair.clean, prepend_bos=True).cpu(), ids.cpu())
    ours, expected = (
        lig_lens.attribute(
            m,
            ids[0],
            corrupted=model().to_tokens(pair.corrupted)[0],
            target=lig_lens.logit_difference(
                *(int(model().tokenizer(w)["input_ids"][-1]) for w in (pair.answer, pair.wrong))
            ),
            progress=False,
        )
        for m in (other, model())
    )
    torch.testing.assert_close(ours.attn, expected.attn, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(has_hooked_transformer(), reason="this TransformerLens has HookedTransformer")
def test_no_hooked_transformer():
    with pytest.raises(lig_lens.InputError, match="has no HookedTransformer"):
        lig_lens.load_model("induction", hooked_transformer=True)


def test_only_induction_is_built_as_a_hooked_transformer():
    with pytest.raises(lig_lens.InputError, match="hooked_transformer=True goes with 'induction'"):
        lig_lens.load_model("minilm", hooked_transformer=True)


@pytest.mark.program
def test_it_can_be_trained_again(tmp_path):
    script = Path(__file__).parent.parent / "training" / "induction.py"
    subprocess.run([sys.executable, script, "--steps", "3", "--batch", "2", "--out", tmp_path], check=True, timeout=300)
    trained = lig_lens.load_model(tmp_path)
    assert trained.cfg.n_layers == 2 and trained.to_tokens("apple bear").tolist()[0][0] == 0
