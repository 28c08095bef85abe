"""A baseline of one's own, as a stranger adds it: one class, one registration, and it works everywhere."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from test_oracle import IDS, MAX_ERROR, block_of, relative_error, residuals
from tiny_models import tiny_bridge

import lig_lens
from lig_lens.cli.main import run
from lig_lens.errors import InputError
from lig_lens.paths import BASELINES


def from_the_pages() -> type[lig_lens.Baseline]:
    """The baseline that CONTRIBUTING.md shows as an example, as it stands there."""
    page = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (source,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "(Baseline)" in block)
    names: dict[str, Any] = {"__name__": "mean"}
    exec(source, names)
    return names["Mean"]


Mean = from_the_pages()


@pytest.fixture(autouse=True)
def mean() -> Iterator[None]:
    lig_lens.register_baseline("mean", Mean, maps=["attn", "block"], shared=True)
    yield
    BASELINES.remove("mean")


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_its_numbers_are_right(kind: str, tmp_path: Any) -> None:
    flow = lig_lens.attribute(
        tiny_bridge(kind), IDS, maps=("attn", "block"), attn_baseline="mean", block_baseline="mean", tol=1e-4,
        progress=False,
    )  # fmt: skip
    for layer in (0, 1):
        block, x = block_of(kind, layer), residuals(kind)[layer]
        start = x.mean(0, keepdim=True).expand_as(x)
        expected = {
            "attn": oracle.attn_map(block, x, "tensor", "l2", x, start),
            "block": oracle.block_map(block, x, "tensor", "l2", x, start),
        }
        for name, right in expected.items():
            assert relative_error((getattr(flow, name)[layer],), (right,)) <= MAX_ERROR
    path = flow.save(tmp_path / "flow.safetensors")
    again = lig_lens.Flow.load(path)
    assert again.settings["attn_baseline"] == "mean" and torch.equal(again.attn, flow.attn)


@pytest.mark.parametrize("other", [dict, lambda place: place, torch.zeros(3)])
def test_something_else_is_refused(other: Any) -> None:
    with pytest.raises(InputError, match=r"is no Baseline: make it a subclass of lig_lens\.Baseline"):
        lig_lens.register_baseline("other", other, maps=["attn"])


def test_a_metric_can_start_from_it() -> None:
    model, pair = lig_lens.load_model("induction"), lig_lens.induction_pairs(1)[0]
    metric = lig_lens.logit_difference(pair.answer, pair.wrong)
    flow = lig_lens.attribute(model, pair.clean, target=metric, attn_baseline="mean", progress=False)
    torch.testing.assert_close(flow.attn.sum((1, 2, 3)) + flow.skip.sum(1), flow.total["attn"], rtol=2e-3, atol=1e-4)


def test_the_command_line_knows_it(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = tmp_path / "mean.yaml", tmp_path / "flow.json"
    config.write_text("model: induction\nmaps: [attn]\nattn_baseline: mean\n")
    words = "lamp lake mouse lamp"
    assert run(["explain", words, "--config", str(config), "--json", str(out), "--no-progress"]) == 0
    flags = ["--model", "induction", "--maps", "attn", "--attn-baseline", "mean", "--no-progress"]
    assert run(["explain", words, *flags]) == 0
    assert "attn from mean" in capsys.readouterr().out
    settings = json.loads(out.read_text())["settings"]
    assert settings["attn_baseline"] == "mean"


def test_it_is_for_the_maps_that_it_was_registered_for(ids: torch.Tensor) -> None:
    with pytest.raises(InputError, match="Unknown mlp_baseline 'mean': use one of 'zero', 'att_itb_a0', 'corrupted'"):
        lig_lens.attribute(tiny_bridge("llama"), ids, mlp_baseline="mean", progress=False)


@pytest.mark.parametrize(
    ("name", "maps", "message"),
    [
        ("zero", ["attn"], "There is a baseline 'zero' already"),
        ("my own", ["attn"], "a name is a word"),
        ("mine", "attn", "give a list of names"),
        ("mine", ["atn"], "Unknown map 'atn'"),
    ],
)
def test_what_cannot_be_registered(name: str, maps: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        lig_lens.register_baseline(name, Mean, maps=maps)
    assert name == "zero" or name not in BASELINES.names()
