"""The entry: a model, a prompt and a class in, what explains it out."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lig_lens import __version__
from lig_lens.arguments import checked
from lig_lens.blocks.known import Blocks, Needs
from lig_lens.blocks.values import Values
from lig_lens.errors import InputError
from lig_lens.hooked import HookedModel, check_hooked, check_one_stack
from lig_lens.inputs.inputs import Inputs
from lig_lens.inputs.pairs import check_different, is_batch, one_each, read_pair
from lig_lens.inputs.references import reference_of
from lig_lens.integrate.integrand import Budget
from lig_lens.integrate.onward import Downstream
from lig_lens.models.loading import check_evaluating, describe_processing, model_name
from lig_lens.models.running import one_at_a_time, prepared
from lig_lens.models.stack import Forward, stack_of
from lig_lens.progress import progress as shown_progress
from lig_lens.relevance import METHODS
from lig_lens.relevance.explained import Explained
from lig_lens.relevance.method import Method, made
from lig_lens.relevance.relevance import Relevance
from lig_lens.relevance.targets import as_metric, shown_class
from lig_lens.settings import EXPLANATION, Explanation, plain_numbers, validated


@checked
@torch.inference_mode(False)  # gradients are needed, whatever mode the caller is in
def explain_class(
    model: HookedModel | object,
    prompt: Any,
    *,
    target: Any = EXPLANATION.target,
    against: Any = EXPLANATION.against,
    method: Any = "ca_lig",
    baseline: str | None = EXPLANATION.baseline,
    corrupted: Any = EXPLANATION.corrupted,
    tol: float = EXPLANATION.tol,
    max_nodes: int = EXPLANATION.max_nodes,
    max_batch_tokens: int = EXPLANATION.max_batch_tokens,
    prepend_bos: bool | None = None,
    progress: bool = EXPLANATION.progress,
    **parameters: Any,
) -> "Relevance | list[Relevance]":
    """What the positions of a prompt do to a class's logit, or to any other number of a model's output.

    Args:
        model: a hooked model; classifiers of texts and of images, and language models.
        prompt: a text, token ids or an image, as `attribute` takes them. A list of prompts gives a list.
        target: number or name of a class; None for the class that the model predicts. Of a language model a token whose
            logit at the last position is meant, or its prediction. Or any metric of the output.
        against: a second class or token, whose logit is taken off: 'positive' against 'negative'.
        method: `ca_lig` or one of its neighbours (see `METHODS`), or a `Method`. A list of them, or of targets, gives a
            list.
        baseline: where paths start, for methods that have one: of texts the name of a token that takes the place of all
            that are not special, `mask`, `pad`, `unk`, `eos` or `bos` (by default the first that the tokenizer has); of
            images `blurred` (the default), `mean` (its own colour), `zero_pixels` or `black`. `zero` of either stands
            for residual vectors of zeros at each boundary.
        corrupted: a second prompt in place of a baseline: as many tokens, or an image of the same shape.
        tol: largest completeness gap, relative to the change of the number along the path.
        max_nodes: nodes that may be spent on one integral.
        max_batch_tokens: tokens that are run through a block at once; bounds memory, changes nothing else.
        prepend_bos: for texts, handed to the model's tokenizer; its own default with None.
        progress: show a progress bar.
        parameters: of the method, such as `mix=0.3`; see its class.

    Raises:
        InputError: a class that does not exist, a model without a class head, a method that the model's layout does not
            allow, or anything else that cannot be used; before anything is computed.
        BoundaryError: a model whose blocks cannot be run by themselves.
        NonFiniteError: NaN or infinite values.

    Warns:
        ConvergenceWarning: for integrals that missed `tol`.
    """
    hooked = check_hooked(model)
    check_one_stack(hooked, "explain_class")
    check_evaluating(hooked)
    asked = {"tol": tol, "max_nodes": max_nodes, "max_batch_tokens": max_batch_tokens, "progress": progress}
    settings = validated(Explanation, plain_numbers({**asked, "baseline": baseline}))
    budget = Budget(settings.tol, settings.max_nodes, settings.max_batch_tokens)
    several = [is_batch(prompt), isinstance(target, (list, tuple)), isinstance(method, (list, tuple))]
    if sum(several) > 1:
        raise InputError("Give a list of prompts, of targets or of methods, one of them at a time.")
    prompts: Sequence[Any] = prompt if several[0] else [prompt]
    targets: Sequence[Any] = target if several[1] else [target]
    named: Sequence[Any] = method if several[2] else [method]
    methods = [_method(one, parameters) for one in named]
    if not methods or not targets:
        raise InputError(f"{'target' if methods else 'method'} is an empty list: give at least one.")
    others = one_each(several[0], prompt, corrupted, "corrupted")
    if corrupted is not None and baseline is not None:
        raise InputError(
            f"baseline={baseline!r} and corrupted are both given: paths start in one place, leave one out."
        )
    found = []
    with one_at_a_time(hooked), prepared(hooked, hooked):
        stack = stack_of(hooked)
        blocks = Blocks(stack, range(len(stack)))
        steps = sum(one.steps(len(stack)) for one in methods) * len(targets) * len(prompts)
        with shown_progress("lig_lens", "integral", steps, progress) as bar:
            for one, other in zip(prompts, others, strict=True):
                run = _Run(hooked, blocks, methods, baseline, budget, one, other, prepend_bos)
                for name in targets:
                    what = run.explained(name, against)
                    found += [run.relevance(what, each, bar.update) for each in methods]
    return found if any(several) else found[0]


class _Run:
    """One prompt's runs, and what is explained of them."""

    def __init__(
        self,
        model: HookedModel,
        blocks: Blocks,
        methods: Sequence[Method],
        baseline: str | None,
        budget: Budget,
        prompt: Any,
        corrupted: Any,
        prepend_bos: bool | None,
    ) -> None:
        self.model, self.budget, self.baseline = model, budget, None
        self.inputs, second = read_pair(model, prompt, corrupted, prepend_bos)
        needs_start = any(one.needs_start for one in methods)
        if second is not None:
            self.baseline = "corrupted"
        elif needs_start or baseline is not None:
            self.baseline, second = reference_of(model, self.inputs, baseline)
        if second is not None and needs_start:
            check_different(self.inputs, second)
        heads = any(one.needs_heads for one in methods)
        needs = Needs(
            heads, formula=False, messages=heads, without_heads="take a method that needs no attention, such as 'ig'."
        )
        recording = blocks.record(self.inputs, needs, whole=True)
        self.values: Mapping[int, Values] = recording.visited
        _check_heads(methods, self.values)
        self.forward: Forward = recording.whole
        self.second: Inputs | None = second
        self.start: Mapping[int, Values] | None = None
        self.start_forward: Forward | None = None
        if second is not None:
            started = blocks.record(second, Needs(heads=False, formula=False), whole=True)
            self.start, self.start_forward = started.visited, started.whole

    def explained(self, target: Any, against: Any) -> Explained:
        """The number that a target stands for, on this prompt."""
        with torch.no_grad():
            ready = as_metric(self.model, self.forward.output, target, against).on(self.model, self.forward.output)
            start = None if self.start_forward is None else float(ready(self.start_forward.output))
            first = self.values[min(self.values)].call
            down = Downstream(self.forward, ready, float(ready(self.forward.output)), start, first)
            return Explained(self.inputs, self.values, self.start, down, self.budget)

    def relevance(self, what: Explained, method: Method, advance: Any) -> Relevance:
        """Explain a number by one method."""
        answer = method.explain(what, advance)
        return Relevance(
            **vars(answer),
            tokens=self.inputs.tokens,
            special=self.inputs.special,
            layers=what.layers,
            method=method.name,
            target=shown_class(self.model, what.down.metric.name),
            value=what.down.clean,
            reference=what.down.corrupted if method.needs_start else None,
            model_name=model_name(self.model),
            settings=self._settings(method),
        )

    def _settings(self, method: Method) -> dict[str, Any]:
        kept = self.inputs.kept_as
        return {
            "method": method.name,
            "parameters": method.record(),
            "baseline": self.baseline if method.needs_start else None,
            "tol": self.budget.tol,
            "max_nodes": self.budget.max_nodes,
            kept: self.inputs.record(),
            f"corrupted_{kept}": None if self.second is None or not method.needs_start else self.second.record(),
            "model": describe_processing(self.model),
            "versions": {
                "lig_lens": __version__,
                **{name: importlib.metadata.version(name) for name in ("transformer_lens", "torch")},
            },
        }


def _check_heads(methods: Sequence[Method], values: Mapping[int, Values]) -> None:
    """Raise InputError if a method reads attention, and a block has none that can be read."""
    without = next((layer for layer, at in sorted(values.items()) if at.attention is None), None)
    reading = next((one.name for one in methods if one.needs_heads), None)
    if reading is not None and without is not None:
        others = [name for name in METHODS.names() if not METHODS.home(name).needs_heads]
        raise InputError(
            f"The method {reading!r} reads attention, and block {without} of this model has none with separable heads: "
            f"take one of {', '.join(map(repr, others))}."
        )


def _method(given: Any, parameters: dict[str, Any]) -> Method:
    if isinstance(given, Method):
        if parameters:
            raise InputError(f"{next(iter(parameters))} is given beside a method that is an object: set it there.")
        return given
    if not isinstance(given, str):
        raise InputError(f"method={given!r}: give one of {', '.join(METHODS.names())}, or a Method.")
    kind: type[Method] = METHODS.home(given)
    return made(kind, parameters)
