"""CA-LIG against a naive oracle: plain transformers classifiers in float64, loops instead of matrices."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import image_models
import pytest
import torch
from checkpoints import IDS, OTHER
from class_oracle import KINDS, ClassOracle, ca_lig
from torch import Tensor

import lig_lens as ll

TOL = 1e-5
CLASS = 1


class Case:
    """A classifier, its oracle, a prompt and another that paths start from, and what the oracle says of them."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.oracle = ClassOracle(kind, folder)
        self.model = ll.load_model(str(folder), device="cpu", dtype=torch.float64)
        images = kind.startswith("ViT")
        self.prompt, self.other = (
            (image_models.image(0).double(), image_models.image(1).double())
            if images
            else (torch.tensor(IDS), torch.tensor(OTHER))
        )

        self.start = self.oracle.resid(self.other)
        self.token = [self.oracle.token_relevance(self.prompt, self.start, logit, boundary) for boundary in range(3)]
        with torch.no_grad():
            ends = [logit(self.oracle(one)[0]) for one in (self.prompt, self.other)]
        self.change = float(ends[0] - ends[1])
        self.patterns, self.gradients = self.oracle.pattern_gradients(self.prompt, logit)

    def explain(self, **options: Any) -> ll.Relevance:
        chosen = {"target": CLASS, "tol": TOL, "corrupted": self.other} | options
        found = ll.explain_class(self.model, self.prompt, progress=False, **chosen)
        assert isinstance(found, ll.Relevance)
        return found


def logit(logits: Tensor) -> Tensor:
    return logits[:, CLASS]


@pytest.fixture(scope="module", params=list(KINDS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    if request.param.startswith("ViT"):
        pytest.importorskip("transformer_lens.model_bridge.supported_architectures.vit")
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def close(found: Tensor | None, wanted: Tensor, within: float = 1e-5) -> None:
    assert found is not None and found.shape == wanted.shape
    assert float((found.double() - wanted).abs().max()) <= within * float(wanted.abs().max())


def test_token_relevance_is_the_path_integral_at_every_boundary(case: Case) -> None:
    found = case.explain()
    assert found.boundaries == (0, 1, 2) and found.token is not None and found.total is not None
    for boundary in found.boundaries:
        close(found.token[boundary], case.token[boundary])
    assert found.total.tolist() == pytest.approx([case.change] * 3, rel=1e-5)
    assert found.token.sum(-1).tolist() == pytest.approx([case.change] * 3, rel=1e-5)
    assert found.value - (found.reference or 0.0) == pytest.approx(case.change, rel=1e-5)


def test_zero_baseline_starts_from_vectors_of_zeros_at_each_boundary(case: Case) -> None:
    found = case.explain(corrupted=None, baseline="zero", tol=1e-4)
    resid = case.oracle.resid(case.prompt)
    assert found.token is not None and found.total is not None and found.reference is None
    for boundary in found.boundaries:
        with torch.no_grad():
            ends = [logit(case.oracle(case.prompt, boundary, scale * resid[boundary])[0]) for scale in (1, 0)]
        assert float(found.total[boundary]) == pytest.approx(float(ends[0] - ends[1]), rel=1e-5)
        assert float(found.token[boundary].sum()) == pytest.approx(float(found.total[boundary]), rel=1e-3)


@pytest.mark.parametrize("at", ["end", "path"])
def test_attention_relevance_is_pattern_times_gradient(case: Case, at: str) -> None:
    found, gradients = case.explain(at=at), case.gradients
    if at == "path":
        gradients = [case.oracle.mean_pattern_gradient(case.prompt, case.start, logit, layer) for layer in range(2)]
    close(found.attention, torch.stack([(p * g).mT for p, g in zip(case.patterns, gradients, strict=True)]))


@pytest.mark.parametrize("through", ["identity", "additive", "conserving"])
@pytest.mark.parametrize(
    ("mix", "scale", "keep", "heads"),
    [(0.5, "sum", "signed", "mean"), (0.3, "max", "positive", "sum"), (1.0, "none", "signed", "max"),
     (0.8, "sum", "positive", "max"), (0.0, "none", "signed", "mean")],
)  # fmt: skip
def test_relevance_is_followed_back(case: Case, through: str, mix: float, scale: str, keep: str, heads: str) -> None:
    found = case.explain(mix=mix, scale=scale, keep=keep, heads=heads, through=through)
    edges = [p * g for p, g in zip(case.patterns, case.gradients, strict=True)]
    if keep == "positive":
        edges = [one * (one > 0) for one in edges]
    over: dict[str, Callable[[Tensor], Tensor]] = {
        "mean": lambda x: x.mean(0), "sum": lambda x: x.sum(0),
        "max": lambda x: torch.where(x.amax(0) >= -x.amin(0), x.amax(0), x.amin(0)),
    }  # fmt: skip
    fused, rolled = ca_lig(case.token, [over[heads](one) for one in edges], mix, scale, through)
    close(found.fused, torch.stack(fused))
    close(found.rolled, torch.stack(rolled))
    assert found.rolled is not None and torch.equal(found.scores, found.rolled[0])


def test_what_is_followed_back_adds_up(case: Case) -> None:
    found = case.explain(mix=0.6)
    assert found.rolled is not None and found.total is not None and found.fused is not None
    for rolled, fused, total in zip(found.rolled, found.fused, found.total, strict=False):
        assert float(rolled.sum()) == pytest.approx(float(total), rel=1e-5)
        assert torch.allclose(fused.sum(-1), rolled, atol=1e-6)
