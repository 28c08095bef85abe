"""The entry: a model, inputs and methods in, how faithful the methods are out."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from lig_lens.errors import ConvergenceWarning, InputError, check_whole, warn_caller
from lig_lens.hooked import HookedModel, check_hooked, check_one_stack
from lig_lens.inputs.inputs import Inputs
from lig_lens.inputs.kinds import kind_of
from lig_lens.inputs.pairs import is_batch
from lig_lens.inputs.token_ids import TokenIds
from lig_lens.models.heads import check_head
from lig_lens.models.loading import check_evaluating, describe_processing, model_name
from lig_lens.models.running import first_tensor, one_at_a_time, prepared
from lig_lens.progress import progress as shown_progress
from lig_lens.relevance import METHODS
from lig_lens.relevance.faithfulness.asked import (
    read_fractions,
    read_given,
    read_measures,
    read_methods,
    read_replacers,
)
from lig_lens.relevance.faithfulness.case import Case, Subject
from lig_lens.relevance.faithfulness.explaining import Explaining
from lig_lens.relevance.faithfulness.league import Curve, League, Row
from lig_lens.relevance.faithfulness.lexicon import words_of
from lig_lens.relevance.faithfulness.measure import NAN, Measure, OfMethod, OfOutputs, OfScores
from lig_lens.relevance.faithfulness.numbers import intervals, probability
from lig_lens.relevance.faithfulness.replacers import Replacer
from lig_lens.relevance.faithfulness.runner import Runner
from lig_lens.relevance.method import Method
from lig_lens.settings import FRACTIONS, MAX_BATCH_TOKENS

_LONGEST = 40  # characters of an input that are kept


@torch.inference_mode(False)  # methods need gradients, whatever mode the caller is in
def faithfulness(
    model: HookedModel | object,
    prompts: Sequence[Any],
    *,
    methods: Any = None,
    replacers: Any = None,
    measures: Any = None,
    fractions: Any = FRACTIONS,
    lexicon: Mapping[str, float] | None = None,
    seed: int = 0,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    progress: bool = True,
    **options: Any,
) -> League:
    """How faithful methods are to a classifier: what it does without the positions that they call relevant.

    The class is the one that the model predicts on the intact input, and scores are signed towards it. Special
    positions are never removed. What is the same for several methods is run once.

    Args:
        model: a hooked classifier of texts or of images.
        prompts: inputs as `explain_class` takes them.
        methods: names, with parameters behind them (`"ca_lig mix=0.25"`), or `Method`s; `"all"` stands for each with
            its usual parameters, and is the default. In a mapping, by labels of one's own; there what was explained
            before may stand as well, a `Relevance` or the scores of all positions for each input.
        replacers: what takes a removed position's place; all that the model can have by default. Of texts `mask`,
            `unk`, `pad` (tokens), `mean` (the mean of all tokens' embeddings) and `dropped` (nothing: the text is
            shorter); of images the baselines `mean`, `zero_pixels`, `black` and `blurred`, patch by patch.
        measures: names, with parameters behind them (`"shapley positions=6"`), or `Measure`s; see `MEASURES`. All by
            default, those with a lexicon where there is one.
        fractions: shares of the positions that are removed, or kept.
        lexicon: valence of words, by their lower-case text.
        seed: of the bootstrap, of ties, and of random weights.
        max_batch_tokens: tokens that are run at once; bounds memory, changes nothing else.
        progress: show a progress bar.
        options: of `explain_class`: `baseline`, `tol`, `max_nodes`, `prepend_bos`.

    Returns:
        League, in which a method or a measure that these inputs do not allow is left out, with the reason.

    Raises:
        InputError: an unknown name or parameter, a model without a class head, a replacer that does not go with such
            inputs, or anything else that cannot be used; before anything is computed.
        NonFiniteError: NaN or infinite logits.

    Warns:
        ConvergenceWarning: for methods whose integrals missed `tol`.
    """
    hooked = check_hooked(model)
    check_one_stack(hooked, "faithfulness")
    check_evaluating(hooked)
    chosen = read_methods(METHODS.names() if methods is None else methods)
    asked = read_measures(measures, lexicon is not None)
    shares = read_fractions(fractions)
    if check_whole("faithfulness: seed", seed) < 0:
        raise InputError(f"seed={seed}: give 0 or more.")
    if not isinstance(max_batch_tokens, int) or not 1 <= max_batch_tokens <= 10**12:
        raise InputError(f"max_batch_tokens={max_batch_tokens!r}: give at least 1, such as {MAX_BATCH_TOKENS}.")
    for name in options:
        if name not in ("baseline", "tol", "max_nodes", "prepend_bos"):
            raise InputError(f"faithfulness has no argument {name!r}: parameters stand behind a method's name.")
    if not is_batch(prompts):
        raise InputError("faithfulness needs several inputs: give a list of texts, of token ids or of images.")
    subjects = _subjects(hooked, prompts, options.get("prepend_bos"), lexicon, seed, max_batch_tokens)
    left_out: dict[str, str] = {}
    removers = read_replacers(hooked, subjects, replacers, left_out)
    explaining = Explaining(
        hooked,
        {label: one for label, one in chosen.items() if isinstance(one, Method)},
        seed,
        {**options, "max_batch_tokens": max_batch_tokens},
    )
    given = {
        label: read_given(hooked, label, one, subjects) for label, one in chosen.items() if not isinstance(one, Method)
    }
    with shown_progress("explaining", "input", len(subjects), progress) as bar:
        explained = []
        for subject in subjects:
            explained.append(explaining.explain(subject, explaining.labels))
            bar.update()
    left_out |= explaining.left_out
    cases = {
        label: [
            Case(subject, given[label][at] if label in given else explained[at][label], shares)
            for at, subject in enumerate(subjects)
        ]
        for label in chosen
        if label not in left_out
    }
    looks: dict[Measure, frozenset[int]] = {}
    for measure in asked:
        try:
            looks[measure] = frozenset(one.number for one in measure.chosen(subjects))
        except InputError as error:
            left_out[measure.label] = str(error)
    work = _Work(cases, looks, seed)
    for remover in removers:
        work.remove(remover, max_batch_tokens, progress)
    work.look(explaining, progress)
    _warn(explaining, len(subjects))
    return League(
        rows=tuple(work.rows),
        curves=tuple(work.curves),
        inputs=tuple(_shown(one) for one in subjects),
        left_out=left_out | work.left_out,
        model_name=model_name(hooked),
        seed=seed,
        settings={
            "methods": list(chosen),
            "replacers": [one.name for one in removers],
            "measures": [one.label for one in asked],
            "fractions": list(shares),
            "targets": [one.target for one in subjects],
            "sha256": [_digest(one) for one in subjects],
            "explain_class": options,
            "model": describe_processing(hooked),
        },
    )


class _Work:
    """Measures of cases, as they are found."""

    def __init__(self, cases: Mapping[str, Sequence[Case]], looks: Mapping[Measure, frozenset[int]], seed: int) -> None:
        self.cases, self.looks, self.seed = cases, looks, seed
        self.rows: list[Row] = []
        self.curves: list[Curve] = []
        self.left_out: dict[str, str] = {}

    def remove(self, replacer: Replacer, max_batch_tokens: int, progress: bool) -> None:
        """Measures of outputs, for one replacer."""
        measures = [one for one in self.looks if isinstance(one, OfOutputs)]
        subjects = [case.subject for case in next(iter(self.cases.values()), [])]
        if not measures or not subjects:
            return
        runner = Runner(replacer, subjects)
        for cases in self.cases.values():
            for case in cases:
                for sets in (case.removed, case.kept, case.empty):
                    runner.ask(case.subject, sets)
                for measure in measures:
                    if case.subject.number in self.looks[measure]:
                        runner.ask(case.subject, measure.removed(case))
        model = replacer.model
        with one_at_a_time(model), prepared(model, model):
            with shown_progress(f"without ({replacer.name})", "run", runner.waiting, progress) as bar:
                runner.run(max_batch_tokens, bar.update)
        for label, cases in self.cases.items():
            for measure in measures:

                def value(case: Case, measure: OfOutputs = measure) -> float:
                    return measure.value(case, runner.logits(case.subject, measure.removed(case)))

                values = [value(case) if case.subject.number in self.looks[measure] else NAN for case in cases]
                self.rows.append(Row(label, replacer.name, measure.label, measure.better, tuple(values)))
            self._draw(label, runner, cases)

    def _draw(self, label: str, runner: Runner, cases: Sequence[Case]) -> None:
        """Curves of one method."""
        for kind in ("removed", "kept"):
            rows = []
            for case in cases:
                found = runner.logits(case.subject, np.concatenate([getattr(case, kind), case.empty]))
                *between, nothing = probability(found, case.subject.target)
                intact = probability(case.subject.intact, case.subject.target)
                ends = (intact, nothing) if kind == "removed" else (nothing, intact)
                rows.append([ends[0], *between, ends[1]])
            numbers = (tuple(one.tolist()) for one in intervals(np.array(rows).T, self.seed))
            self.curves.append(Curve(label, runner.replacer.name, kind, (0.0, *cases[0].fractions, 1.0), *numbers))

    def look(self, explaining: Explaining, progress: bool) -> None:
        """Measures for which nothing is removed."""
        reruns = [one for one in self.looks if isinstance(one, OfMethod)]
        with shown_progress("explaining again", "measure", len(reruns), progress) as bar:
            for measure, numbers in self.looks.items():
                found: dict[str, Sequence[float]] = {}
                seen = {
                    label: [case for case in cases if case.subject.number in numbers]
                    for label, cases in self.cases.items()
                }
                if isinstance(measure, OfScores):
                    found = {label: [measure.value(case) for case in cases] for label, cases in seen.items()}
                elif isinstance(measure, OfMethod):
                    try:
                        found = dict(measure.values(explaining, seen))
                    except InputError as error:
                        self.left_out[measure.label] = str(error)
                    bar.update()
                for label, values in found.items():
                    at = dict(zip((case.subject.number for case in seen[label]), values, strict=True))
                    every = tuple(float(at.get(case.subject.number, NAN)) for case in self.cases[label])
                    self.rows.append(Row(label, None, measure.label, measure.better, every))


def _subjects(
    model: HookedModel,
    prompts: Sequence[Any],
    prepend_bos: Any,
    lexicon: Mapping[str, float] | None,
    seed: int,
    max_batch_tokens: int,
) -> list[Subject]:
    """Inputs as the model takes them, with its logits."""
    read, draw = kind_of(model).read, np.random.default_rng(seed)
    tokenizer = getattr(model, "tokenizer", None)
    found = []
    for number, prompt in enumerate(prompts):
        try:
            inputs = read(model, prompt, prepend_bos=prepend_bos)
            if all(inputs.special):
                raise InputError("nothing in it may be removed, all its positions are special: leave it out.")
        except InputError as error:
            raise InputError(f"Input {number} of {len(prompts)}: {error}") from error
        ties = draw.permutation(len(inputs) - sum(inputs.special))
        found.append(Subject(number, prompt, inputs, np.zeros(0), ties))
    if lexicon is not None and tokenizer is not None and isinstance(found[0].inputs, TokenIds):
        found = [replace(one, words=words_of(tokenizer, cast(TokenIds, one.inputs)), valence=lexicon) for one in found]
    with one_at_a_time(model), prepared(model, model), torch.no_grad():
        _check_classes(model, found[0].inputs)
        runner = Runner(_Nothing(model, "nothing"), found)
        whole = {one.number: np.zeros((1, len(one.inputs)), dtype=bool) for one in found}
        for one in found:
            runner.ask(one, whole[one.number])
        runner.run(max_batch_tokens)
        return [replace(one, intact=runner.logits(one, whole[one.number])[0]) for one in found]


class _Nothing(Replacer):
    """Removes nothing."""

    def row(self, inputs: Inputs, removed: torch.Tensor) -> torch.Tensor:
        return inputs.arguments()[0]


def _check_classes(model: HookedModel, inputs: Inputs) -> None:
    check_head(model, of_logits=True)
    output = first_tensor(model(*inputs.arguments(), **inputs.keywords()))
    if output.ndim != 2 or output.shape[-1] < 2:
        raise InputError(
            f"The model has no class head: its output has shape {list(output.shape)}, not [1, classes]. Load a "
            "classifier, saved as one, such as BertForSequenceClassification."
        )


def _shown(subject: Subject) -> str:
    """What an input is, without giving it away: a league may be published where its inputs may not."""
    text = subject.prompt if isinstance(subject.prompt, str) else subject.inputs.shown
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


def _digest(subject: Subject) -> str:
    own = subject.prompt if isinstance(subject.prompt, str) else json.dumps(subject.inputs.record())
    return hashlib.sha256(own.encode()).hexdigest()


def _warn(explaining: Explaining, n: int) -> None:
    missed = {label: len(some) for label, some in explaining.missed.items() if some}
    if missed:
        said = ", ".join(f"{label} on {count}" for label, count in missed.items())
        warn_caller(
            f"Integrals missed tol on some of {n} inputs: {said}. Raise max_nodes or tol to know what they are worth.",
            ConvergenceWarning,
        )
