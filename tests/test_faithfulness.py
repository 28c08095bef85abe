"""How faithful methods are: runs against the plain model's, one by one, and the whole by hand."""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from checkpoints import SMALL, saved
from image_models import CLASSES, image
from image_models import load as load_images
from image_models import saved as saved_images

import lig_lens as ll
from lig_lens.errors import ConvergenceWarning, InputError, warn_caller
from lig_lens.inputs.pixels import read_image
from lig_lens.inputs.token_ids import TokenIds, read_ids
from lig_lens.relevance.faithfulness import IMAGE_REPLACERS, TEXT_REPLACERS
from lig_lens.relevance.faithfulness.case import Case, Subject
from lig_lens.relevance.faithfulness.explaining import random_weights
from lig_lens.relevance.faithfulness.reruns import Runtime
from lig_lens.relevance.faithfulness.runner import Runner
from lig_lens.relevance.method import Answer, Method

TEXTS = ["w1 w5 w9 w3 w7 w2", "w4 w4 w8 w30 w11", "w6 w12 w3 w2 w1 w0 w9 w9", "w10 w5 w3"]


# Runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bert")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    return saved("BertForSequenceClassification", folder, **SMALL, num_labels=3)


@pytest.fixture(scope="module")
def model(folder: Path, plain: Any) -> Any:
    return ll.load_model(str(folder), device="cpu")


def _of_text(plain: Any, tokenizer: Any, name: str, ids: list[int], removed: set[int]) -> np.ndarray:
    """The plain model's logits, naively."""
    if name == "dropped":
        given = {"input_ids": torch.tensor([[one for at, one in enumerate(ids) if at not in removed]])}
    elif name == "mean":
        table = plain.bert.embeddings.word_embeddings.weight
        rows = [table.mean(0) if at in removed else table[one] for at, one in enumerate(ids)]
        given = {"inputs_embeds": torch.stack(rows)[None]}
    else:
        other = tokenizer.convert_tokens_to_ids(f"[{name.upper()}]")
        given = {"input_ids": torch.tensor([[other if at in removed else one for at, one in enumerate(ids)]])}
    with torch.no_grad():
        return plain(**given).logits[0].numpy()


def _subjects(model: Any, prompts: list[Any], read: Any) -> list[Subject]:
    return [
        Subject(number, prompt, read(model, prompt), np.zeros(3), np.arange(99))
        for number, prompt in enumerate(prompts)
    ]


def _some_sets(subject: Subject, seed: int) -> np.ndarray:
    """All, none, and some drawn sets of the free positions, one of them twice."""
    drawn = np.random.default_rng(seed).random((5, len(subject.free))) < 0.4
    return subject.without(np.concatenate([drawn, drawn[:1], np.ones_like(drawn[:1]), np.zeros_like(drawn[:1])]))


@pytest.mark.parametrize("max_batch_tokens", [1, 24, 4096])
@pytest.mark.parametrize("name", TEXT_REPLACERS.names())
def test_runs_of_texts_are_the_plain_model_s(model: Any, plain: Any, name: str, max_batch_tokens: int):
    subjects = _subjects(model, TEXTS, read_ids)
    runner = Runner(TEXT_REPLACERS.home(name)(model, name), subjects)
    sets = [_some_sets(subject, seed) for seed, subject in enumerate(subjects)]
    for subject, some in zip(subjects, sets, strict=True):
        runner.ask(subject, some)
    assert runner.waiting == sum(len({row.tobytes() for row in some}) for some in sets)
    done: list[int] = []
    runner.run(max_batch_tokens, done.append)
    assert sum(done) == sum(len({row.tobytes() for row in some}) for some in sets) and runner.waiting == 0
    for subject, some in zip(subjects, sets, strict=True):
        naive = [
            _of_text(plain, model.tokenizer, name, subject.inputs.ids[0].tolist(), set(np.flatnonzero(row)))
            for row in some
        ]
        np.testing.assert_allclose(runner.logits(subject, some), np.array(naive), atol=2e-6)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("vit")
    return saved_images("ViTForImageClassification", folder), load_images(folder)


@pytest.mark.parametrize("name", IMAGE_REPLACERS.names())
def test_runs_of_images_are_the_plain_model_s(images: tuple[Any, Any], name: str):
    plain, model = images
    subjects = _subjects(model, [image(0), image(1)], read_image)
    replacer = IMAGE_REPLACERS.home(name)(model, name)
    if name == "black":  # no image processor says what it is
        with pytest.raises(InputError, match="needs to know which pixel values are black"):
            Runner(replacer, subjects)
        return
    runner = Runner(replacer, subjects)
    for subject in subjects:
        some = _some_sets(subject, subject.number)
        runner.ask(subject, some)
        runner.run(4096)
        own = subject.prompt
        other = {
            "zero_pixels": torch.zeros_like(own),
            "mean": own.mean((1, 2), keepdim=True).expand_as(own),
            "blurred": _blurred(own) if name == "blurred" else own,
        }[name]
        naive = []
        for row in some:
            filled = own.clone()
            for position in np.flatnonzero(row):
                down, across = divmod(int(position) - 1, 3)
                where = (slice(None), slice(4 * down, 4 * down + 4), slice(4 * across, 4 * across + 4))
                filled[where] = other[where]
            with torch.no_grad():
                naive.append(plain(pixel_values=filled[None]).logits[0].numpy())
        np.testing.assert_allclose(runner.logits(subject, some), np.array(naive), atol=2e-6)


def _blurred(own: torch.Tensor) -> torch.Tensor:
    ndimage = pytest.importorskip("scipy.ndimage")
    return torch.tensor(np.stack([ndimage.gaussian_filter(c, 3.0, mode="reflect", truncate=4.0) for c in own.numpy()]))


def test_dropped_needs_something_that_is_left(tmp_path: Path):
    saved("GPT2ForSequenceClassification", tmp_path, vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64,
          num_labels=2, pad_token_id=0)  # fmt: skip
    gpt = ll.load_model(str(tmp_path), device="cpu")
    ids = [[5, 12, 30, 7], [9, 8, 7]]
    scores = {"given": [np.arange(4.0), np.arange(3.0)]}
    with pytest.raises(InputError, match="'dropped' takes positions out, and nothing is left"):
        ll.faithfulness(gpt, ids, methods=scores, replacers=["dropped"], progress=False)
    league = ll.faithfulness(gpt, ids, methods=scores, measures=["deletion"], progress=False)
    assert "nothing is left" in league.left_out["dropped"] and "mean" in league.replacers


def _gpt2(folder: Path, **config: Any) -> Any:
    saved("GPT2ForSequenceClassification", folder, vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64,
          num_labels=2, **config)  # fmt: skip
    return ll.load_model(str(folder), device="cpu")


def test_a_token_that_the_head_looks_for_replaces_nothing(tmp_path: Path):
    gpt = _gpt2(tmp_path)
    gpt.original_model.config.pad_token_id = gpt.tokenizer.pad_token_id = 3
    with pytest.raises(InputError, match="'pad' token as the end of a text"):
        TEXT_REPLACERS.home("pad")(gpt, "pad")


def test_a_model_that_takes_one_input_at_a_time(tmp_path: Path):
    gpt = _gpt2(tmp_path)
    gpt.original_model.config.pad_token_id = None
    with pytest.raises(InputError, match="no more than one prompt at a time"):
        ll.faithfulness(gpt, [[5, 12, 30, 7], [9, 8, 7]], progress=False)


# The whole


@dataclass(frozen=True)
class OfPlaces(Method):
    """Scores that do not look at the model."""

    name = "of_places"
    needs_heads = False

    def explain(self, what: Any, advance: Any) -> Answer:
        time.sleep(0.05)
        return Answer(scores=torch.arange(float(len(what))))


@dataclass(frozen=True)
class Fails(OfPlaces):
    name = "fails"

    def explain(self, what: Any, advance: Any) -> Answer:
        raise InputError("this layout does not allow it.")


@pytest.fixture(scope="module")
def league(model: Any) -> Any:
    methods = {"ca_lig": "ca_lig", "tokens": "ca_lig mix=0", "places": OfPlaces(), "fails": Fails()}
    options: dict[str, Any] = {"tol": 1e-2, "progress": False, "lexicon": {"w1": 2.0, "w9": -1.0, "w3": 0.5}}
    return ll.faithfulness(model, TEXTS, methods=methods, replacers=["mask", "dropped"], **options)


def _values(league: Any, method: str, measure: str, replacer: str | None = None) -> np.ndarray:
    (row,) = [one for one in league.rows if (one.method, one.measure, one.replacer) == (method, measure, replacer)]
    return np.array(row.values)


def test_a_league(model: Any, plain: Any, league: Any):
    assert league.methods == ("ca_lig", "tokens", "places") and league.replacers == ("mask", "dropped")
    assert "this layout does not allow it" in league.left_out["fails"]
    assert league.settings["sha256"][0] == hashlib.sha256(TEXTS[0].encode()).hexdigest()
    # By hand, for one input: the class, its scores, and the plain model without the most relevant half.
    relevance = ll.explain_class(model, TEXTS[2], method="ca_lig", tol=1e-2, progress=False)
    ids = model.to_tokens(TEXTS[2])[0].tolist()
    logits = torch.tensor(_of_text(plain, model.tokenizer, "mask", ids, set()))
    target = int(logits.argmax())
    assert relevance.target.startswith(f"class_logit({target})")
    order = sorted(range(1, len(ids) - 1), key=lambda at: -float(relevance.scores[at]))
    lost = []
    for fraction in (0.1, 0.25, 0.5, 0.75, 0.9):
        gone = set(order[: max(1, round(fraction * 8 + 1e-9))])
        without = torch.tensor(_of_text(plain, model.tokenizer, "mask", ids, gone))
        lost.append(float(logits.softmax(-1)[target] - without.softmax(-1)[target]))
    assert _values(league, "ca_lig", "comprehensiveness", "mask")[2] == pytest.approx(sum(lost) / 5, abs=1e-6)
    alone = [
        float(logits[target]) - _of_text(plain, model.tokenizer, "mask", ids, {at})[target]
        for at in range(1, len(ids) - 1)
    ]
    assert _values(league, "ca_lig", "leave_one_out pearson", "mask")[2] == pytest.approx(
        np.corrcoef(relevance.scores[1:-1], alone)[0, 1], abs=1e-4
    )


def test_long_inputs_are_not_kept_whole(model: Any):
    text = " ".join(["w1 w5"] * 20)
    found = ll.faithfulness(model, [text], methods=[OfPlaces()], measures=["deletion"], progress=False)
    assert found.inputs == (text[:40] + "…",) and text not in found.to_json()


def test_curves_of_a_league(league: Any):
    (curve,) = [one for one in league.curves if (one.method, one.replacer, one.kind) == ("tokens", "mask", "removed")]
    assert curve.fractions == (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)
    (kept,) = [one for one in league.curves if (one.method, one.replacer, one.kind) == ("tokens", "mask", "kept")]
    assert (kept.mean[0], kept.mean[-1]) == pytest.approx((curve.mean[-1], curve.mean[0]), abs=1e-12)
    lost = curve.mean[0] - sum(curve.mean[1:-1]) / 5
    (entry,) = [
        one
        for one in league.table
        if (one.method, one.measure, one.replacer) == ("tokens", "comprehensiveness", "mask")
    ]
    assert entry.mean == pytest.approx(lost, abs=1e-12) and entry.low <= entry.mean <= entry.high


def test_what_does_not_look_at_weights_survives_randomization(model: Any, league: Any):
    before = [weight.detach().clone() for weight in model.parameters()]
    np.testing.assert_allclose(_values(league, "places", "randomization"), 1, atol=1e-12)
    assert abs(_values(league, "ca_lig", "randomization").mean()) < 0.9
    blocks = list(model.blocks)
    heads = {id(one) for name, one in model.named_parameters() if "pooler" in name or "classifier" in name}
    for chosen in ([], blocks[1:], blocks):
        wanted = heads | {id(one) for block in chosen for one in block.parameters()}
        with random_weights(model, chosen, blocks, 0):
            for one, old in zip(model.parameters(), before, strict=True):
                drawn = id(one) in wanted and bool(old.std() > 0)
                assert bool((one != old).any()) == drawn
                if drawn and one.numel() > 500:
                    assert float(one.detach().std()) == pytest.approx(float(old.detach().std()), rel=0.2)
    assert all(bool((one == old).all()) for one, old in zip(model.parameters(), before, strict=True))


def test_a_head_that_is_registered_first_cannot_be_found():
    class HeadFirst(torch.nn.Module):
        cfg, hook_dict, to_tokens = None, None, None

        def __init__(self) -> None:
            super().__init__()
            self.head, self.blocks = torch.nn.Linear(4, 2), torch.nn.ModuleList([torch.nn.Linear(4, 4)])

    model = HeadFirst()
    with pytest.raises(InputError, match="no head behind its blocks"), random_weights(model, [], list(model.blocks), 0):
        pass


def test_runtime_is_that_of_the_method_alone(league: Any):
    assert 0.05 <= _values(league, "places", "runtime").min()


def test_runtime_does_not_depend_on_the_order(monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    class SlowAtFirst:
        seed, labels = 0, ("one", "two")
        seen: ClassVar[set[str]] = set()

        def explain(self, subject: Subject, labels: Any) -> dict[str, Any]:
            clock[0] += 1.0 if labels[0] in self.seen else 20.0
            self.seen.add(labels[0])
            return {}

        def randomized(self, share: float) -> Any:
            raise AssertionError

    subject = Subject(0, None, TokenIds(torch.tensor([[1]]), ("a",), (False,)), np.zeros(2), np.arange(1))
    cases = {label: [Case(subject, np.zeros(1), (0.5,))] for label in ("one", "two")}
    assert Runtime().values(SlowAtFirst(), cases) == {"one": [1.0], "two": [1.0]}


def test_inputs_that_missed_tol_are_counted_once(model: Any):
    with pytest.warns(ConvergenceWarning, match="missed tol on some of 2 inputs") as caught:
        ll.faithfulness(model, TEXTS[:2], methods=["ig", "lig"], measures=["runtime", "randomization"], tol=1e-7,
                        max_nodes=7, progress=False)  # fmt: skip
    assert [str(one.message) for one in caught if "ig on 2, lig on 2." in str(one.message)]
    assert len(caught) == 1


@dataclass(frozen=True)
class Warns(OfPlaces):
    """Says what missed in a warning alone, and something else."""

    name = "warns"

    def explain(self, what: Any, advance: Any) -> Answer:
        warn_caller("missed", ConvergenceWarning)
        warn_caller("old", DeprecationWarning)
        return super().explain(what, advance)


def test_what_is_only_warned_of_counts(model: Any):
    with pytest.warns() as caught:
        ll.faithfulness(model, TEXTS[:2], methods=[Warns(), OfPlaces()], measures=["runtime"], progress=False)
    messages = [str(one.message) for one in caught]
    assert sum("inputs: warns on 2. Raise" in one for one in messages) == 1 and "old" in messages


def test_versus_is_paired(league: Any):
    (entry,) = [
        one
        for one in league.versus("ca_lig")
        if (one.method, one.measure, one.replacer) == ("tokens", "deletion", "mask")
    ]
    a, b = (_values(league, name, "deletion", "mask") for name in ("ca_lig", "tokens"))
    assert entry.mean == pytest.approx((a - b).mean(), abs=1e-12) and entry.n == 4
    assert entry.low <= entry.mean <= entry.high and entry.high - entry.low <= np.ptp(a - b)
    frame = league.to_dataframe(versus="ca_lig")
    assert set(frame.method) == {"tokens", "places"} and "ca_lig minus each method" in league.to_markdown("ca_lig")
    with pytest.raises(InputError, match="Unknown method 'rollout'"):
        league.versus("rollout")


def test_files(tmp_path: Path, league: Any):
    league.to_json(tmp_path / "l.json")
    read = ll.League.load(tmp_path / "l.json")
    assert read.to_json() == league.to_json() and read.to_markdown() == league.to_markdown()
    document = json.loads((tmp_path / "l.json").read_text())
    assert len(document["rows"]) == len(league.table)
    for damaged in ("{", "{}", json.dumps({**document, "schema": 99}), json.dumps({**document, "rows": [1]})):
        (tmp_path / "l.json").write_text(damaged)
        with pytest.raises(InputError, match="Cannot read a league"):
            ll.League.load(tmp_path / "l.json")


def test_what_was_explained_before(model: Any, league: Any):
    before = [ll.explain_class(model, text, tol=1e-2, progress=False) for text in TEXTS]
    options: dict[str, Any] = {"replacers": "mask", "measures": ["deletion", "insertion"], "progress": False}
    found = ll.faithfulness(
        model, TEXTS, methods={"before": before, "scores": [one.scores for one in before]}, **options
    )
    for measure in ("deletion", "insertion"):
        np.testing.assert_allclose(
            _values(found, "before", measure, "mask"), _values(league, "ca_lig", measure, "mask"), atol=1e-7
        )
        assert (_values(found, "before", measure, "mask") == _values(found, "scores", measure, "mask")).all()
    other = ll.explain_class(model, TEXTS[0], target=(int(before[0].target[12]) + 1) % 3, progress=False)
    with pytest.raises(InputError, match="explain the predicted class"):
        ll.faithfulness(model, TEXTS, methods={"x": [other, *before[1:]]}, **options)
    target = int(before[0].target[12])
    minus = ll.explain_class(model, TEXTS[0], target=target, against=(target + 1) % 3, progress=False)
    with pytest.raises(InputError, match="explain the predicted class"):
        ll.faithfulness(model, TEXTS, methods={"x": [minus, *before[1:]]}, **options)
    moved = ll.explain_class(model, " ".join(TEXTS[0].split()[::-1]), target=target, progress=False)
    with pytest.raises(InputError, match="'x' explains another prompt than input 0"):
        ll.faithfulness(model, TEXTS, methods={"x": [moved, *before[1:]]}, **options)
    with pytest.raises(InputError, match="'x' has 3 entries for 4 inputs"):
        ll.faithfulness(model, TEXTS, methods={"x": before[1:]}, **options)
    with pytest.raises(InputError, match=r"scores of shape \[2\] for the 8 positions"):
        ll.faithfulness(model, TEXTS, methods={"x": [[1.0, 2.0], *before[1:]]}, **options)


def test_the_same_again(model: Any, league: Any):
    def once(seed: int) -> Any:
        methods = {"ties": [np.zeros(len(text.split()) + 2) for text in TEXTS]}
        return ll.faithfulness(
            model, TEXTS, methods=methods, replacers=["mask"], measures=["deletion"], seed=seed, progress=False
        )

    assert once(0).to_json() == once(0).to_json()
    assert (_values(once(0), "ties", "deletion", "mask") != _values(once(1), "ties", "deletion", "mask")).any()


# What cannot be used


@pytest.mark.parametrize(
    "options, message",
    [
        ({"measures": ["compleatness"]}, "Unknown measure 'compleatness'"),
        ({"measures": ["shapley size=3"]}, "The measure 'shapley' has no parameter 'size': it takes by, positions"),
        ({"measures": ["shapley positions=40"]}, "positions=40: give a number from 3 to 16"),
        ({"measures": ["leave_one_out by=kendall"]}, "Unknown by 'kendall'"),
        ({"measures": ["runtime", "runtime"]}, "'runtime' is given twice"),
        ({"measures": []}, "measures is empty"),
        ({"methods": ["ca_lik"]}, "Unknown method 'ca_lik'"),
        ({"methods": ["ca_lig mix"]}, "'ca_lig mix': 'mix' is not of the form name=value"),
        ({"methods": ["ca_lig mix=3"]}, "mix=3.0: give a number from 0"),
        ({"methods": ["ca_lig", "ca_lig"]}, "'ca_lig' is given twice"),
        ({"methods": [3]}, "methods: int is none"),
        ({"methods": []}, "methods is empty"),
        ({"fractions": (0.1, 1.5)}, "fractions holds 1.5"),
        ({"fractions": (0.0,)}, "fractions holds 0"),
        ({"fractions": ()}, "fractions is empty"),
        ({"fractions": "some"}, "fractions='some'"),
        ({"replacers": ["blurred"]}, "'blurred' goes with images, and these are texts: use some of 'mask', 'unk'"),
        ({"replacers": ["noise"]}, "Unknown replacer 'noise'"),
        ({"replacers": ["mask", "mask"]}, "'mask' is given twice"),
        ({"max_batch_tokens": 0}, "max_batch_tokens=0"),
        ({"seed": -1}, "seed=-1: give 0 or more"),
        ({"mix": 0.5}, "faithfulness has no argument 'mix'"),
    ],
)
def test_bad_input(model: Any, options: dict[str, Any], message: str):
    with pytest.raises(InputError) as error:
        ll.faithfulness(model, TEXTS, **{"progress": False, **options})
    assert message in str(error.value)


def test_bad_inputs(model: Any, images: tuple[Any, Any]):
    with pytest.raises(InputError, match="'dropped' goes with texts, and these are images: use some of 'mean'"):
        ll.faithfulness(images[1], [image(0), image(1)], replacers=["dropped"], progress=False)
    with pytest.raises(InputError, match="several inputs"):
        ll.faithfulness(model, TEXTS[0], progress=False)
    with pytest.raises(InputError, match="Input 1 of 2: The prompt is empty"):
        ll.faithfulness(model, ["w1", " "], progress=False)
    with pytest.raises(InputError, match="Input 0 of 1: nothing in it may be removed"):
        ll.faithfulness(model, [[2, 3]], progress=False)
    with pytest.raises(InputError, match="The model has no class head"):
        ll.faithfulness(ll.load_model("induction"), [[1, 2, 3]], progress=False)


def test_a_league_of_images(images: tuple[Any, Any]):
    _, model = images
    given = {"given": [torch.arange(10.0), -torch.arange(10.0)]}
    league = ll.faithfulness(model, [image(0), image(1)], methods=given, progress=False)
    assert league.replacers == ("mean", "zero_pixels", "blurred") and "black" in league.left_out
    assert len(league.settings["targets"]) == 2 and CLASSES["num_labels"] == 5
    assert "No input has 3 to 8 positions" in league.left_out["shapley spearman"]
