"""`explain_class`: targets, baselines, lists, and what is refused."""

import re
import warnings
from pathlib import Path
from typing import Any

import image_models
import pytest
import torch
from checkpoints import GPT2, IDS, OTHER, SMALL, saved

import lig_lens as ll
from lig_lens.relevance import METHODS
from lig_lens.relevance.follow import conserving, follow

NAMES = {"id2label": {0: "bad", 1: "so-so", 2: "good"}, "label2id": {"bad": 0, "so-so": 1, "good": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    saved("BertForSequenceClassification", folder, **SMALL, **NAMES)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return ll.load_model(str(folder), device="cpu")


def explain(model: Any, prompt: Any = IDS, **options: Any) -> Any:
    return ll.explain_class(model, prompt, progress=False, **options)


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([ids]))[0]
    return found


def test_without_a_target_the_predicted_class_is_explained(model: Any) -> None:
    found, wanted = explain(model), logits(model, IDS)
    predicted = int(wanted.argmax())
    assert found.target == f"class_logit({predicted}) {NAMES['id2label'][predicted]!r}"
    assert found.value == pytest.approx(float(wanted[predicted]), rel=1e-5)


@pytest.mark.parametrize("target", [2, "good", "Good", torch.tensor(2), ll.class_logit(2), lambda x: x[0, 2]])
def test_a_class_has_a_number_and_a_name(model: Any, target: Any) -> None:
    found = explain(model, target=target)
    assert found.value == pytest.approx(float(logits(model, IDS)[2]), rel=1e-5)
    assert torch.allclose(found.scores, explain(model, target=2).scores)


def test_one_class_against_another_is_the_difference_of_their_logits(model: Any) -> None:
    found, wanted = explain(model, target="good", against="bad", method="ca_lig", mix=0.0), logits(model, IDS)
    assert found.value == pytest.approx(float(wanted[2] - wanted[0]), rel=1e-5)
    good, bad = explain(model, target=["good", "bad"], mix=0.0)
    # Integrals are linear in what is explained.
    assert torch.allclose(found.scores, good.scores - bad.scores, atol=2e-3 * float(found.scores.abs().max()))


def test_lists_give_what_single_calls_give(model: Any) -> None:
    for options in ({"prompt": [IDS, OTHER]}, {"target": [0, 2]}, {"method": ["ca_lig", "ca_lig"]}):
        several = explain(model, **{"target": 2, **options})
        name, values = next(iter(options.items()))
        single = [explain(model, **{"target": 2, name: value}) for value in values]
        assert len(several) == 2
        for one, other in zip(several, single, strict=True):
            assert torch.equal(one.scores, other.scores) and one.target == other.target


def test_baselines_keep_special_tokens_and_replace_all_others(folder: Path) -> None:
    model = ll.load_model(str(folder), device="cpu")
    tokenizer = model.tokenizer
    text = tokenizer.decode(IDS)
    found = explain(model, text, target=1, baseline="unk")
    assert found.settings["baseline"] == "unk"
    ids = found.settings["token_ids"]
    wanted = [one if special else tokenizer.unk_token_id for one, special in zip(ids, found.special, strict=True)]
    assert found.settings["corrupted_token_ids"] == wanted
    assert found.reference == pytest.approx(float(logits(model, wanted)[1]), rel=1e-5)
    assert any(found.special) and not all(found.special)


def test_a_second_prompt_may_stand_for_a_baseline(model: Any) -> None:
    found = explain(model, target=1, corrupted=OTHER)
    assert found.settings["baseline"] == "corrupted"
    assert found.reference == pytest.approx(float(logits(model, OTHER)[1]), rel=1e-5)


def test_a_language_model_explains_the_token_that_it_predicts(tmp_path: Path) -> None:
    saved("GPT2LMHeadModel", tmp_path, **GPT2)
    model = ll.load_model(str(tmp_path), device="cpu")
    found = explain(model, corrupted=OTHER)
    wanted = model(torch.tensor([IDS]))[0, -1].detach()
    assert found.target == f"token_logit({int(wanted.argmax())})"
    assert found.value == pytest.approx(float(wanted.max()), rel=1e-5)
    found = explain(model, target=7, against=8, baseline="zero")
    assert found.value == pytest.approx(float(wanted[7] - wanted[8]), rel=1e-4)


def test_parameters_are_recorded(model: Any) -> None:
    found = explain(model, mix=0.25, keep="positive")
    parameters = found.settings["parameters"]
    assert parameters["mix"] == 0.25 and parameters["keep"] == "positive" and parameters["through"] == "conserving"
    assert found.settings["method"] == "ca_lig" and found.settings["tol"] == 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "fine"}, "target='fine' is no class of this model: it has 0 ('bad'), 1 ('so-so'), 2 ('good')."),
        ({"target": 3}, "target=3 is no class"),
        ({"target": -1}, "target=-1 is no class"),
        ({"target": 1.5}, "target=1.5 is no class"),
        ({"target": True}, "target=True is no class"),
        ({"against": 1}, "against=1 without a target"),
        ({"target": 1, "against": "so-so"}, "target and against are the same class, 1"),
        ({"target": lambda x: x[0, 0], "against": 1}, "against goes with a class or a token"),
        ({"method": "lime"}, "Unknown method 'lime'"),
        ({"method": 3}, "method=3: give one of"),
        ({"lam": 0.5}, "The method 'ca_lig' has no parameter 'lam': it takes mix, attention, keep"),
        ({"mix": 1.5}, "mix=1.5: give a number from 0"),
        ({"through": "all"}, "Unknown through 'all'"),
        ({"baseline": "blurred"}, "Unknown baseline 'blurred'"),
        ({"corrupted": OTHER, "baseline": "mask"}, "baseline='mask' and corrupted are both given"),
        ({"corrupted": IDS[:3]}, "corrupted has 3 tokens, the prompt 6"),
        ({"corrupted": IDS}, "corrupted equals the prompt"),
        ({"tol": 2}, "tol=2"),
        ({"tol": "a"}, "tol='a'"),
        ({"max_nodes": 3}, "max_nodes=3"),
        ({"max_nodes": "x"}, "max_nodes='x'"),
        ({"max_batch_tokens": 0}, "max_batch_tokens=0"),
        ({"method": []}, "method is an empty list"),
        ({"method": "rollout", "baseline": "nonsense"}, "Unknown baseline 'nonsense'"),
        ({"prompt": [IDS, IDS], "target": [0, 1]}, "one of them at a time"),
        ({"prompt": [IDS, IDS], "corrupted": [OTHER]}, "corrupted has 1 entries for 2 prompts: give a list"),
    ],
)
def test_what_cannot_be_used_is_refused(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ll.InputError, match=re.escape(message)):
        explain(model, **options)


def test_parameters_beside_a_method_object_are_refused(model: Any) -> None:
    with pytest.raises(ll.InputError, match="mix is given beside a method that is an object"):
        explain(model, method=METHODS["ca_lig"], mix=0.1)


def test_a_model_without_a_class_head_says_what_it_has(tmp_path: Path) -> None:
    saved("BertForMaskedLM", tmp_path, **SMALL)
    model = ll.load_model(str(tmp_path), device="cpu")
    with pytest.raises(ll.InputError, match="no class head: it gives the logits of 40 tokens at each position"):
        explain(model)
    assert explain(model, target=ll.token_logit(7, pos=2), corrupted=OTHER).target == "token_logit(7, pos=2)"


def test_baselines_of_images(tmp_path: Path) -> None:
    pytest.importorskip("transformer_lens.model_bridge.supported_architectures.vit")
    plain = image_models.saved("ViTForImageClassification", tmp_path)
    model, image = image_models.load(tmp_path), image_models.image(0)
    for name, other in (
        ("zero_pixels", torch.zeros(3, 12, 12)),
        ("mean", image.mean((1, 2), keepdim=True).expand(3, 12, 12)),
    ):
        found = explain(model, image, target=1, baseline=name, mix=0.0)
        with torch.no_grad():
            wanted = float(plain(other[None]).logits[0, 1])
        assert found.reference == pytest.approx(wanted, rel=1e-4) and found.settings["baseline"] == name
        assert float(found.scores.sum()) == pytest.approx(found.value - wanted, rel=2e-3)
    assert explain(model, image).settings["baseline"] == "blurred"
    with pytest.raises(ll.InputError, match="Unknown baseline 'mask': use one of 'blurred', 'mean', 'zero_pixels'"):
        explain(model, image, baseline="mask")


def test_two_metrics_of_one_name_are_two_numbers(model: Any) -> None:
    found, wanted = explain(model, target=[lambda x: x[0, 1], lambda x: x[0, 2]]), logits(model, IDS)
    assert [one.value for one in found] == pytest.approx([float(wanted[1]), float(wanted[2])], rel=1e-5)


def test_padding_is_no_baseline_where_the_head_reads_past_it(tmp_path: Path) -> None:
    saved("GPT2ForSequenceClassification", tmp_path, **GPT2, num_labels=3, pad_token_id=0)
    model = ll.load_model(str(tmp_path), device="cpu")
    assert explain(model, corrupted=None).settings["baseline"] == "unk"
    with pytest.raises(ll.InputError, match="baseline='pad': the model's head reads the last token that is not its"):
        explain(model, baseline="pad")


def test_a_head_that_knows_no_padding_says_so(tmp_path: Path) -> None:
    saved("GPT2ForSequenceClassification", tmp_path, **GPT2, num_labels=3)
    model = ll.load_model(str(tmp_path), device="cpu")
    for call in (
        lambda: explain(model),
        lambda: ll.attribute(model, IDS, corrupted=OTHER, target=ll.class_logit(0), progress=False),
    ):
        with pytest.raises(ll.InputError, match="its config has no pad_token_id"):
            call()


def test_what_nearly_cancels_is_warned_of(model: Any) -> None:
    edges = torch.full((1, 3, 3), 0.1)
    edges[0, :, 1] = torch.tensor([-0.7, 0.3, -0.59])
    with pytest.warns(ll.CancellationWarning, match="in block 0 its size is"):
        follow(torch.tensor([0.0, 1.0, 0.0]), edges, conserving)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ll.CancellationWarning)
        follow(torch.tensor([0.0, 1.0, 0.0]), edges.clamp(min=0), conserving)
        explain(model)


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("recurrent")
    saved("MambaForCausalLM", folder, vocab_size=40, hidden_size=32, num_hidden_layers=2, state_size=8)
    return ll.load_model(str(folder), device="cpu")


@pytest.mark.parametrize("method", METHODS.names())
def test_methods_that_read_attention_need_some(recurrent: Any, method: str) -> None:
    assert recurrent.tokenizer.mask_token_id is not None  # and yet it predicts the next token
    if METHODS.home(method).needs_heads:
        with pytest.raises(ll.InputError, match=f"The method '{method}' reads attention, and block 0 of this model"):
            explain(recurrent, method=method, corrupted=OTHER)
    else:
        assert explain(recurrent, method=method, corrupted=OTHER).target.startswith("token_logit(")
