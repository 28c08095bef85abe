"""Attention with a sink, whose pattern adds up to less than 1: what it sends, and what is left without an edge."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import IDS, saved
from families import FAMILIES

import lig_lens as ll
from lig_lens.errors import InputError

METRIC = ll.logit_difference(3, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt_oss")
    saved("GptOssForCausalLM", folder, **FAMILIES["GptOssForCausalLM"].config)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return ll.load_model(str(folder), device="cpu", dtype="float64")


@pytest.mark.parametrize("n_pos", [1, 2, 5])
def test_messages(n_pos: int, folder: Path, model: Any) -> None:
    """By both engines, also of one token, which shows no formula; they add up to the plain model's change."""
    asked: dict[str, Any] = {"target": METRIC, "split": "message", "tol": 1e-4, "progress": False}
    ids, other = IDS[-n_pos:], [30 - one for one in IDS[-n_pos:]]
    flows = [ll.attribute(model, ids, corrupted=other, engine=engine, **asked) for engine in ("auto", "hooks")]
    torch.testing.assert_close(flows[0].attn, flows[1].attn, rtol=1e-3, atol=1e-5)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    plain.set_experts_implementation("eager")
    with torch.no_grad():
        ends = [plain(torch.tensor([one])).logits[0, -1] for one in (ids, other)]
    change = (ends[0] - ends[1])[3] - (ends[0] - ends[1])[4]
    totals = flows[0].attn.sum((1, 2, 3)).double() + flows[0].skip.sum(1)
    torch.testing.assert_close(totals, change.expand(2), rtol=1e-3, atol=1e-6)


def test_a_renormalised_knock_out_leaves_the_sink_its_share(
    folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the plain model in whose scores the source cannot be seen."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float64)
    plain.set_experts_implementation("eager")
    layer, head, src, dst = edge = (1, 2, 4, 5)
    effects = ll.patching.knock_out(model, IDS, METRIC, edges=[edge], renormalise=True, progress=False)
    softmax, calls = torch.nn.functional.softmax, [0]

    def without(scores: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if scores.ndim == 4 and scores.shape[-1] == len(IDS) + 1:  # with a column for the sink
            if calls[0] == layer:
                scores = scores.clone()
                scores[0, head, dst, src] = -torch.inf
            calls[0] += 1
        return softmax(scores, *args, **options)

    def metric() -> float:
        with torch.no_grad():
            logits = plain(torch.tensor([IDS])).logits[0, -1]
        return float(logits[3] - logits[4])

    before = metric()
    monkeypatch.setattr(torch.nn.functional, "softmax", without)
    after = metric()
    assert calls[0] == 2 and abs(before - after) > 1e-4
    assert float(effects.values[0, head, src, dst]) == pytest.approx(before - after, rel=1e-4)


def test_shares_of_a_row_are_refused(model: Any) -> None:
    with pytest.raises(InputError, match=r"an attention pattern whose rows add up to 1.* a sink may take part of them"):
        ll.attribute(model, IDS, maps="attn", attn_baseline="itb_map_ratio", progress=False)
