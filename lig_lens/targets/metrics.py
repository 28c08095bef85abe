"""Scalars of a model's output: logit differences, log-probabilities, class logits, KL divergence, any function."""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.arguments import checked
from lig_lens.errors import InputError
from lig_lens.models.heads import check_head
from lig_lens.targets.target import Target

Function = Callable[[Tensor], Any]
"""Of the logits of one prompt, [1, pos, d_vocab]; gives one number as a tensor."""


@dataclass(frozen=True)
class Metric(Target):
    """A scalar of the logits, as a target of `attribute` and of `patching`.

    Made by `metric`, `logit_difference`, `token_logit`, `log_probability`, `class_logit` and `kl_divergence`. `prepare`
    gives the function once the model (for its tokenizer) and the logits of the clean prompt are known.
    """

    name: str
    prepare: Callable[[object, Tensor], Function] = field(repr=False)
    of_logits: bool = True
    """Whether it needs logits; a function of one's own may take the vectors of a model without a head."""
    per_metric = True

    def on(self, model: object, clean: Float[Tensor, "1 *rest"]) -> "BatchMetric":
        """Make the metric ready for a model and a clean prompt.

        Args:
            model: a hooked model, for its tokenizer.
            clean: its logits on the clean prompt.

        Raises:
            InputError: an answer that is no single token, a metric that does not give one finite number, or logits that
                come from random weights.
        """
        check_head(model, self.of_logits)
        ready = BatchMetric(self.name, self.prepare(model, clean))
        ready(clean)
        return ready


@dataclass(frozen=True)
class BatchMetric:
    """A metric of several runs at once."""

    name: str
    function: Function

    def __call__(self, logits: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch"]:
        """One number for each run.

        Raises:
            InputError: the metric does not give one finite number.
        """
        return torch.stack([self._one(run[None]) for run in logits])

    def sensitivity(self, logits: Float[Tensor, "1 *rest"]) -> float:
        """How much the metric would move if every logit moved by the largest of its position: its rounding's yardstick.

        Raises:
            InputError: the metric has no gradient, or none that is finite.
        """
        with torch.enable_grad():
            leaf = logits.detach().clone().requires_grad_()
            value = self.checked(self(leaf))
            (gradient,) = torch.autograd.grad(value.sum(), leaf, materialize_grads=True)
        self.check_gradient(gradient)
        return float((gradient.abs().sum(-1) * logits.abs().amax(-1)).sum())

    def checked(self, value: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
        """Return `value` if it carries a gradient.

        Raises:
            InputError: it does not.
        """
        if not value.requires_grad:
            raise InputError(
                f"The metric {self.name} has no gradient: it has to be differentiable in the logits, without detach(), "
                "argmax or comparisons. Interventions (lig_lens.interventions.patching) can do with such a metric."
            )
        return value

    def check_gradient(self, *gradients: Tensor) -> None:
        """Raise InputError if the metric's gradient is not finite although its value is."""
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            raise InputError(
                f"The metric {self.name} has a gradient that is NaN or infinite, although its value is finite: "
                "infinite numbers inside it (masked_fill(-inf), log or sqrt of 0) do that. Leave such logits out, by "
                "indexing, or fill in a finite number."
            )

    def _one(self, logits: Tensor) -> Tensor:
        value = self.function(logits)
        shown = f"The metric {self.name} "
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            given = f"shape {list(value.shape)} and dtype {value.dtype}" if isinstance(value, Tensor) else repr(value)
            raise InputError(
                f"{shown}gave {given} for logits of shape {list(logits.shape)}: it has to give one number, as a float "
                "tensor that keeps its gradient."
            )
        if not math.isfinite(float(value.detach())):
            raise InputError(f"{shown}gave {float(value.detach())}: it has to be finite on every run.")
        return value.reshape(())


@checked
def metric(function: object, name: str | None = None) -> Metric:
    """Any differentiable function of the logits.

    Args:
        function: gets the logits of one run, `[1, pos, d_vocab]` (what the model returns for one prompt; of a model
            without a head its vectors), and gives one number as a tensor; TransformerLens' patching metrics can be used
            as they are.
        name: how results are labelled; the function's own name by default.

    Raises:
        InputError: not a function.
    """
    if isinstance(function, Metric):
        return function
    if not callable(function):
        raise InputError(f"metric needs a function of the logits, got {type(function).__name__}.")
    return Metric(
        name or str(getattr(function, "__name__", "metric")), lambda _model, _clean: function, of_logits=False
    )


@checked
def logit_difference(correct: str | int, wrong: str | int, pos: int = -1) -> Metric:
    """Logit of one answer token minus that of another.

    Args:
        correct: token as text (mind the leading space) or id.
        wrong: the same for the other answer.
        pos: position of the prediction.

    Raises:
        InputError: with a model, an answer that is no single token, or a position that the prompt does not have.
    """

    def prepare(model: object, clean: Tensor) -> Function:
        plus, minus = (_token(model, answer, clean) for answer in (correct, wrong))
        if plus == minus:
            raise InputError(f"logit_difference: {correct!r} and {wrong!r} are the same token, {plus}.")
        at = _position(clean, pos)
        return lambda logits: logits[0, at, plus] - logits[0, at, minus]

    return Metric(f"logit_difference({correct!r}, {wrong!r}{_named(pos, -1)})", prepare)


@checked
def log_probability(answer: str | int, pos: int = -1) -> Metric:
    """Log-probability (natural logarithm) of an answer token; arguments and errors as in `logit_difference`."""

    def prepare(model: object, clean: Tensor) -> Function:
        token, at = _token(model, answer, clean), _position(clean, pos)
        return lambda logits: logits[0, at].log_softmax(-1)[token]

    return Metric(f"log_probability({answer!r}{_named(pos, -1)})", prepare)


@checked
def token_logit(answer: str | int, pos: int = -1) -> Metric:
    """Logit of a token; arguments and errors as in `logit_difference`."""

    def prepare(model: object, clean: Tensor) -> Function:
        token, at = _token(model, answer, clean), _position(clean, pos)
        return lambda logits: logits[0, at, token]

    return Metric(f"token_logit({answer!r}{_named(pos, -1)})", prepare)


@checked
def class_logit(index: int, pos: int | None = None) -> Metric:
    """One logit of a classifier.

    Args:
        index: number of the class.
        pos: for models that give logits at every position, which of them; without it they are taken to be
            `[1, n_classes]`.

    Raises:
        InputError: no whole numbers; with a model, a class or a position that it does not have.
    """

    def prepare(_model: object, clean: Tensor) -> Function:
        if pos is None and clean.ndim != 2:
            raise InputError(
                f"class_logit: the model's logits have shape {list(clean.shape)}, with a position axis: give pos=."
            )
        at = () if pos is None else (_position(clean, pos),)
        if not 0 <= index < clean.shape[-1]:
            raise InputError(f"class_logit: class {index} is outside 0 … {clean.shape[-1] - 1}.")
        place = (0, *at, index)
        return lambda logits: logits[place]

    return Metric(f"class_logit({index}{_named(pos, None)})", prepare)


@checked
def kl_divergence(pos: int = -1) -> Metric:
    """KL divergence of a run's next-token distribution from the clean run's, in nats: 0 on the clean run.

    It falls on the way from corrupted to clean, so what restores the clean answer contributes negatively.

    Raises:
        InputError: with a model, a position that the prompt does not have, or a head that was never trained.
    """

    def prepare(model: object, clean: Tensor) -> Function:
        at = _position(clean, pos)
        wanted = clean[0, at].detach().log_softmax(-1)
        return lambda logits: (wanted.exp() * (wanted - logits[0, at].log_softmax(-1))).sum()

    return Metric("kl_divergence" if pos == -1 else f"kl_divergence(pos={pos})", prepare)


def _named(pos: int | None, usual: int | None) -> str:
    return "" if pos == usual else f", pos={pos}"


def _position(logits: Tensor, pos: int) -> int:
    if logits.ndim != 3:
        raise InputError(
            f"The model's output has shape {list(logits.shape)}, but this metric needs logits [1, pos, d_vocab]: use "
            "class_logit(), or metric() with a function of that output."
        )
    n_pos = logits.shape[1]
    if not -n_pos <= pos < n_pos:
        raise InputError(f"pos={pos} is outside the prompt's {n_pos} tokens.")
    return pos % n_pos


def _token(model: object, answer: str | int, logits: Tensor) -> int:
    """Id of an answer token."""
    d_vocab = logits.shape[-1]
    if isinstance(answer, str):
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is None:
            raise InputError(f"The model has no tokenizer: give the answer {answer!r} as a token id.")
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            pieces = [tokenizer.decode([i]) for i in ids]
            raise InputError(
                f"The answer {answer!r} is {len(ids)} tokens, {pieces}: give one that is a single token (mind the "
                "leading space), or the id of the token that tells the answers apart."
            )
        word = tokenizer.decode(ids)
        if word.strip().casefold() != answer.strip().casefold():
            raise InputError(
                f"The tokenizer does not know the answer {answer!r}, it reads {word!r}: give another word."
            )
        answer = int(ids[0])
    try:
        answer = operator.index(answer)
    except TypeError as error:
        raise InputError(f"The answer {answer!r} is neither a text nor a token id.") from error
    if not 0 <= answer < d_vocab:
        raise InputError(f"Answer token {answer} is outside the vocabulary 0 … {d_vocab - 1}.")
    return answer
