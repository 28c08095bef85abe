"""The neighbours of CA-LIG against naive oracles, captum and networkx, and as limits of it."""

import sys
from pathlib import Path
from typing import Any

import image_models
import pytest
import torch
import transformers
from checkpoints import IDS, OTHER, SMALL, saved
from class_oracle import KINDS, ClassOracle
from families import FAMILIES
from neighbour_oracle import attcat, captum_ig, chefer, gradient_times_input, largest_flow, read, rollout
from torch import Tensor

import lig_lens as ll
from lig_lens.errors import InputError, MissingPackageError
from lig_lens.relevance import METHODS
from lig_lens.relevance.flow import largest_flows

TOL, WITHIN, CLASS = 1e-5, 1e-5, 1
BLIND = ("rollout", "flow", "attention", "random")


def logit(logits: Tensor) -> Tensor:
    return logits[:, CLASS]


class Case:
    """A classifier, its oracle, a prompt and another that paths start from."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.oracle = ClassOracle(kind, folder)
        self.model = ll.load_model(str(folder), device="cpu", dtype=torch.float64)
        self.prompt, self.other = torch.tensor(IDS), torch.tensor(OTHER)
        if kind.startswith("ViT"):
            self.prompt, self.other = image_models.image(0).double(), image_models.image(1).double()
        patterns, gradients = self.oracle.pattern_gradients(self.prompt, logit)
        self.patterns, self.gradients = [one.detach() for one in patterns], gradients
        self.readout = torch.zeros(len(self.patterns[0][0]), dtype=torch.float64)
        self.readout[read(self.oracle)] = 1.0

    def explain(self, method: str, **options: Any) -> ll.Relevance:
        chosen = {"target": CLASS, "tol": TOL, "corrupted": self.other} | options
        found = ll.explain_class(self.model, self.prompt, method=method, progress=False, **chosen)
        assert isinstance(found, ll.Relevance)
        return found


@pytest.fixture(scope="module", params=list(KINDS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case("BertForSequenceClassification", tmp_path_factory.mktemp("bert"))


def close(found: Tensor | None, wanted: Tensor, within: float = WITHIN) -> None:
    assert found is not None and found.shape == wanted.shape
    assert float((found.double() - wanted).abs().max()) <= within * float(wanted.abs().max())


def stacked(patterns: list[Tensor]) -> Tensor:
    """[layer, head, src, dst]."""
    return torch.stack(patterns).mT


def test_rollout(case: Case) -> None:
    found, products = case.explain("rollout"), rollout(case.patterns)
    close(found.rolled, torch.stack([case.readout @ one for one in products]))
    close(found.scores, case.readout @ products[0])
    close(found.attention, stacked(case.patterns))
    # What the last block hands from the position that is read.
    last = 0.5 * (case.patterns[-1].mean(0) + torch.eye(len(case.readout)).double())
    assert found.fused is not None
    close(found.fused[-1], (last * case.readout[:, None]).T)
    close(found.fused.sum(-1), found.rolled.double())  # type: ignore[union-attr]
    assert float(found.scores.sum()) == pytest.approx(1.0, abs=1e-5)


def test_chefer(case: Case) -> None:
    found = case.explain("chefer")
    close(found.scores, case.readout @ chefer(case.patterns, case.gradients))
    edges = [(p * g).clamp(min=0) for p, g in zip(case.patterns, case.gradients, strict=True)]
    close(found.attention, stacked(edges))
    close(found.rolled[-1], case.readout @ chefer(case.patterns[-1:], case.gradients[-1:]))  # type: ignore[index]


def test_attention_of_the_last_block(case: Case) -> None:
    found = case.explain("attention")
    close(found.scores, case.readout @ case.patterns[-1].mean(0))
    close(found.attention, stacked(case.patterns))


def test_gradient_times_input_at_every_boundary(case: Case) -> None:
    found = case.explain("grad_x_input")
    wanted = torch.stack(gradient_times_input(case.oracle, case.prompt, logit))
    assert found.boundaries == tuple(range(len(wanted))) and found.total is None
    close(found.token, wanted)
    close(found.scores, wanted[0])


@pytest.mark.parametrize("vectors, first", [("entering", 0), ("leaving", 1)])
def test_attcat(case: Case, vectors: str, first: int) -> None:
    found = case.explain("attcat", vectors=vectors)
    cats = gradient_times_input(case.oracle, case.prompt, logit)[first : first + len(case.patterns)]
    added = attcat(case.patterns, cats)
    assert found.boundaries == tuple(range(first, first + len(cats)))
    close(found.token, torch.stack(cats))
    close(found.scores, torch.stack(added).sum(0))
    close(found.rolled[-1], added[-1])  # type: ignore[index]
    assert found.attention is not None
    close(found.attention.mean(1).sum((0, -1)), torch.stack(added).sum(0))


def test_integrated_gradients_against_captum_at_the_embeddings(case: Case) -> None:
    found = case.explain("ig")
    assert found.boundaries == (0,) and found.total is not None
    close(found.scores, captum_ig(case.oracle, case.prompt, case.other, CLASS, 0, 200))
    close(found.token[0], found.scores.double())  # type: ignore[index]
    ends = [logit(case.oracle(one)[0]).item() for one in (case.prompt, case.other)]
    assert float(found.scores.sum()) == pytest.approx(ends[0] - ends[1], rel=1e-5)


def test_integrated_gradients_against_captum_at_every_boundary(case: Case) -> None:
    found = case.explain("ig_layers")
    assert found.boundaries == (0, 1, 2) and found.token is not None
    for boundary in found.boundaries:
        wanted = captum_ig(case.oracle, case.prompt, case.other, CLASS, boundary, 200)
        close(found.token[boundary], wanted)
    close(found.scores, found.token[0].double())
    close(case.explain("ig_layers", boundary=1).scores, found.token[1].double())
    close(case.explain("ig_layers", boundary=-1).scores, found.token[2].double())


def test_flow_against_networkx(case: Case) -> None:
    found = case.explain("flow", every_layer=True)
    wanted = [largest_flow(case.patterns, case.readout, row) for row in range(len(case.patterns))]
    close(found.rolled, torch.stack(wanted), 1e-6)
    alone = case.explain("flow")
    assert alone.rolled is None
    close(alone.scores, wanted[0], 1e-6)


def test_flow_by_hand() -> None:
    """Three positions, two blocks; the output looks at position 2, then at 1 and 2 alike.

    Capacities of the last block: 1 has 0.25 to 0 and 0.75 to itself; 2 has 0.2 to 0, 0.1 to 1 and 0.7 to itself. Of the
    first: 0 has 1 to itself; 1 has 0.3 to 0 and 0.7 to itself; 2 has 0.1 to 0, 0.25 to 1 and 0.65 to itself.
    """
    first = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.4, 0.0], [0.2, 0.5, 0.3]], dtype=torch.float64)
    last = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.4, 0.2, 0.4]], dtype=torch.float64)
    capacities = torch.stack([0.5 * (one + torch.eye(3).double()).T for one in (first, last)])
    # By way of 0, 1 and 2 behind the first block; the last step is narrower for 2 -> 0, 2 -> 1 and 2 -> 2.
    from_last = [0.2 + 0.1 + 0.1, 0.1 + 0.25, 0.65]
    found = largest_flows(capacities, torch.tensor([0.0, 0.0, 1.0]))
    close(found, torch.tensor(from_last, dtype=torch.float64), 1e-8)
    # To 0, 1 gives 0.25 straight on and 0.25 by way of itself, where 2 finds 0.05 of 0.3 left. To 1, 1 gives its 0.5 by
    # way of itself, and 2 0.1 there and 0.25 by way of itself. To 2, 2 gives its 0.5.
    from_two = [0.25 + 0.25 + 0.2 + 0.05 + 0.1, 0.5 + 0.1 + 0.25, 0.5]
    found = largest_flows(capacities, torch.tensor([0.0, 0.5, 0.5]))
    close(found, torch.tensor(from_two, dtype=torch.float64), 1e-8)


@pytest.mark.parametrize(
    "method, options",
    [
        ("chefer", {"mix": 1.0, "keep": "positive", "through": "additive", "scale": "none"}),
        ("rollout", {"mix": 1.0, "attention": "pattern", "through": "identity", "scale": "none"}),
    ],
    ids=["chefer", "rollout"],
)
def test_attention_alone_is_a_limit_of_ca_lig(method: str, options: dict[str, Any], case: Case) -> None:
    """One position is read, so that all of F(x) - F(x0) stands there behind the last block."""
    neighbour, ca_lig = case.explain(method), case.explain("ca_lig", **options)
    change = (logit(case.oracle(case.prompt)[0]) - logit(case.oracle(case.other)[0])).item()
    assert neighbour.rolled is not None and neighbour.fused is not None
    close(ca_lig.scores, neighbour.scores.double() * change)
    close(ca_lig.rolled, neighbour.rolled.double() * change)
    close(ca_lig.fused, neighbour.fused.double() * change)
    close(ca_lig.attention, neighbour.attention.double())  # type: ignore[union-attr]


def test_tokens_alone_are_a_limit_of_ca_lig(case: Case) -> None:
    close(case.explain("ca_lig", mix=0.0).scores, case.explain("ig").scores.double())


def test_a_head_that_reads_all_positions_weighs_them_by_lengths_of_gradients(tmp_path: Path) -> None:
    plain = saved("BertForMaskedLM", tmp_path, **SMALL).double()
    plain.set_attn_implementation("eager")
    model = ll.load_model(str(tmp_path), device="cpu", dtype=torch.float64)
    weight = torch.arange(1.0, 1.0 + len(IDS), dtype=torch.float64)

    def spread(logits: Tensor) -> Tensor:
        return (logits[..., 9] * weight).sum()

    out = plain(torch.tensor([IDS]), output_attentions=True, output_hidden_states=True)
    (gradient,) = torch.autograd.grad(spread(out.logits), out.hidden_states[-1])
    readout = gradient[0].norm(dim=-1) / gradient[0].norm(dim=-1).sum()
    assert int((readout > 0.05).sum()) > 3
    patterns = [one[0].detach() for one in out.attentions]
    wanted = {
        "rollout": readout @ rollout(patterns)[0],
        "attention": readout @ patterns[-1].mean(0),
        "flow": largest_flow(patterns, readout, 0),
    }
    for name, scores in wanted.items():
        found = ll.explain_class(model, IDS, target=ll.metric(spread), method=name, progress=False)
        close(found.scores, scores)  # type: ignore[union-attr]


def test_random_scores_are_those_of_a_prompt_and_a_seed(bert: Case) -> None:
    first, again = bert.explain("random", seed=3), bert.explain("random", seed=3, target=0)
    assert torch.equal(first.scores, again.scores) and first.settings["parameters"] == {"seed": 3}
    elsewhere = ll.explain_class(bert.model, OTHER, method="random", seed=3, progress=False)
    for other in (bert.explain("random", seed=4), bert.explain("random"), elsewhere):
        assert not bool((other.scores == first.scores).any())  # type: ignore[union-attr]
    many = torch.cat([bert.explain("random", seed=seed).scores for seed in range(200)])
    assert abs(float(many.mean())) < 0.1 and float(many.std()) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("method", METHODS.names())
def test_a_baseline_is_told_where_there_is_one(method: str, bert: Case) -> None:
    found = bert.explain(method)
    starts = method in ("ca_lig", "ig", "ig_layers")
    assert (found.reference is not None) == starts == (found.settings["baseline"] is not None)
    assert found.method == method and len(found.scores) == len(IDS)


@pytest.mark.parametrize("method", BLIND)
def test_methods_that_are_blind_to_the_class(method: str, bert: Case) -> None:
    assert torch.equal(bert.explain(method).scores, bert.explain(method, target=2).scores)


def test_methods_without_heads_take_recurrences(tmp_path: Path) -> None:
    kind, target = "BambaForCausalLM", ll.token_logit(9)
    saved(kind, tmp_path, **FAMILIES[kind].config | {"attn_layer_indices": [0]})
    model = ll.load_model(str(tmp_path), device="cpu")
    for method in ("grad_x_input", "ig", "random"):
        ll.explain_class(model, IDS, corrupted=OTHER, target=target, method=method, progress=False)
    for method in ("rollout", "chefer", "attention", "attcat", "flow"):
        with pytest.raises((InputError, ll.errors.BoundaryError)):
            ll.explain_class(model, IDS, target=target, method=method, progress=False)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("random", {"seed": 1.5}, r"seed=1\.5: give a whole number"),
        ("ig_layers", {"boundary": "last"}, "boundary='last': give a whole number"),
        ("ig_layers", {"boundary": 3}, r"boundary=3: give one from 0 \(the embeddings\) to 2"),
        ("attcat", {"vectors": "enter"}, "Unknown vectors 'enter'.* Did you mean 'entering'"),
        ("flow", {"every_layer": 1}, "every_layer=1: give True or False"),
        ("rollout", {"mix": 0.5}, "'rollout' has no parameter 'mix': it takes no parameters"),
    ],
)
def test_parameters_that_cannot_be_used(method: str, options: dict[str, Any], message: str, bert: Case) -> None:
    with pytest.raises(InputError, match=message):
        bert.explain(method, **options)


def test_flow_without_scipy(bert: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(MissingPackageError, match=r"'flow' needs the package 'scipy'.*pip install scipy"):
        bert.explain("flow")


def test_the_oracles_patterns_are_the_models(bert: Case) -> None:
    """That eager attention is what gradients were taken of: the plain model gives the same logits without it."""
    other = transformers.BertForSequenceClassification.from_pretrained(bert.oracle.folder).double().eval()
    with torch.no_grad():
        close(other(bert.prompt[None]).logits, bert.oracle(bert.prompt)[0])
