"""A Relevance on disk and in other formats: the same numbers come back, and bad files are clear errors."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flows import make_flow
from relevances import make_relevance
from safetensors import safe_open
from safetensors.torch import save_file
from test_damaged_files import damaged

import lig_lens as ll
from lig_lens.errors import FlowFileError, InputError, RelevanceFileError
from lig_lens.relevance.header import LABELS
from lig_lens.relevance.relevance import AXES, Relevance

ONLY_SCORES = {name: None for name in AXES if name != "scores"} | {"boundaries": (), "reference": None}
KINDS = {"everything": {}, "scores alone": ONLY_SCORES, "no path": {"total": None, "gap": None, "converged": None}}


def same(one: Relevance, other: Relevance) -> bool:
    tensors = [(getattr(one, name), getattr(other, name)) for name in AXES]
    return all(getattr(one, name) == getattr(other, name) for name in LABELS) and all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b)) for a, b in tensors
    )


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_give_the_same_relevance(tmp_path: Path, kind: str) -> None:
    relevance = make_relevance(model_name="Ünï → <b>", **KINDS[kind])
    path = relevance.save(tmp_path / "r.safetensors")
    again = Relevance.load(path)
    assert type(again) is Relevance and same(relevance, again)
    assert [file.name for file in tmp_path.iterdir()] == ["r.safetensors"]


def test_what_shares_memory_can_be_saved(tmp_path: Path) -> None:
    rolled = torch.randn(2, 7)
    relevance = make_relevance(scores=rolled[0], rolled=rolled)
    assert same(Relevance.load(relevance.save(tmp_path / "r.safetensors")), relevance)


def test_damages_anywhere(tmp_path: Path) -> None:
    relevance, rng, refused = make_relevance(), random.Random(0), 0
    data, path = relevance.save(tmp_path / "r.safetensors").read_bytes(), tmp_path / "s.safetensors"
    for _ in range(200):
        path.write_bytes(damaged(data, rng))
        try:
            again = Relevance.load(path)
        except RelevanceFileError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert same(again, relevance)
    assert refused > 180


def _rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], object]) -> None:
    with safe_open(path, framework="pt") as stored:
        head = json.loads(stored.metadata()["lig_lens"])
        tensors = {name: stored.get_tensor(name).clone() for name in stored.keys()}
    del head["checksummed"]
    change(head, tensors)
    save_file(tensors, path, metadata={"lig_lens": json.dumps(head)})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda head, tensors: head.update(schema_version=2), "schema version 2, and this lig_lens reads up to 1"),
        (lambda head, tensors: head.update(schema="lig_lens.flow"), "damaged Relevance header .*lig_lens.flow"),
        (lambda head, tensors: head.update(schema_version=0), "damaged Relevance header"),
        (lambda head, tensors: head.pop("target"), "damaged Relevance header .*target"),
        (lambda head, tensors: head.update(tokens=["a"]), r"is damaged \(Relevance: scores has shape \[7\]"),
        (lambda head, tensors: tensors.pop("scores"), "has no scores"),
        (lambda head, tensors: tensors.update(extra=torch.zeros(1)), "unexpected tensor 'extra'"),
        (lambda head, tensors: tensors.update(token=tensors["token"].double()), "unexpected tensor 'token'"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, change: Any, message: str) -> None:
    path = make_relevance().save(tmp_path / "r.safetensors")
    _rewritten(path, change)
    with pytest.raises(RelevanceFileError, match=message):
        Relevance.load(path)


def test_a_flow_is_no_relevance_and_the_reverse(tmp_path: Path) -> None:
    flow, relevance = tmp_path / "f.safetensors", tmp_path / "r.safetensors"
    make_flow().save(flow)
    make_relevance().save(relevance)
    with pytest.raises(RelevanceFileError, match=r"damaged Relevance header .*schema 'lig_lens.flow'"):
        Relevance.load(flow)
    with pytest.raises(FlowFileError, match=r"damaged Flow header .*schema 'lig_lens.relevance'"):
        ll.Flow.load(relevance)
    with pytest.raises(RelevanceFileError, match=r"is a folder, not a Relevance file: give a file that Relevance.save"):
        Relevance.load(tmp_path)
    with pytest.raises(ll.ResultFileError, match="does not exist"):
        Relevance.load(tmp_path / "none")


def test_json_holds_everything(tmp_path: Path) -> None:
    relevance = make_relevance()
    document = json.loads(relevance.to_json(tmp_path / "r.json"))
    assert json.loads((tmp_path / "r.json").read_text()) == document
    assert document["schema"] == "lig_lens.relevance" and document["schema_version"] == 1
    assert {name: document[name] for name in ("method", "target", "value", "reference", "settings")} == {
        "method": "ca_lig",
        "target": "class_logit(1) 'positive'",
        "value": 1.25,
        "reference": -0.5,
        "settings": relevance.settings,
    }
    for name, axes in AXES.items():
        found = document["tensors"][name]
        assert found["axes"] == list(axes)
        np.testing.assert_array_equal(np.asarray(found["values"], dtype=np.float32), getattr(relevance, name).float())
    assert set(json.loads(make_relevance(**ONLY_SCORES).to_json())["tensors"]) == {"scores"}


def test_a_row_for_each_position() -> None:
    relevance = make_relevance()
    frame = relevance.to_dataframe()
    assert list(frame.columns) == ["position", "token", "special", "score"]
    assert tuple(frame["token"]) == relevance.tokens and tuple(frame["special"]) == relevance.special
    np.testing.assert_array_equal(frame["score"], relevance.scores)
    layers = relevance.to_dataframe(layers=True)
    assert list(layers.columns[4:]) == ["rolled_0", "rolled_1", "token_0", "token_1", "token_2"]
    np.testing.assert_array_equal(layers["token_2"], relevance.token[2])
    assert len(make_relevance(**ONLY_SCORES).to_dataframe(layers=True).columns) == 4


@pytest.mark.parametrize("settings", [{"a": torch.zeros(1)}, {"a": float("nan")}])
def test_settings_that_cannot_be_written_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="cannot be written as JSON"):
        make_relevance(settings=settings)
