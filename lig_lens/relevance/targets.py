"""The number that is explained, as users name it: a class, one class against another, a token, or a metric."""

import contextlib
import operator
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lig_lens.errors import InputError
from lig_lens.hooked import HookedModel
from lig_lens.models.heads import class_names, fills_in_masks
from lig_lens.targets.metrics import Metric, class_logit, logit_difference, metric, token_logit


def as_metric(model: HookedModel, output: Float[Tensor, "1 *rest"], target: Any, against: Any = None) -> Metric:
    """The metric that a target stands for.

    Args:
        model: with its class names and tokenizer.
        output: of the model on the prompt: logits of classes [1, class], or of tokens [1, pos, token].
        target: number or name of a class; of a language model a token, whose logit at the last position is meant; None
            for what the model predicts; or a metric, or a function of the output.
        against: a class or token whose logit is taken off.

    Raises:
        InputError: a class or a token that does not exist, or a model that predicts neither.
    """
    if isinstance(target, Metric) or callable(target):
        if against is not None:
            raise InputError("against goes with a class or a token as target: give a metric that has both instead.")
        return metric(target)
    if output.ndim == 2:
        return _of_classes(model, output, target, against)
    if output.ndim != 3:
        raise InputError(f"The model's output has shape {list(output.shape)}: give a metric of it as target.")
    d_vocab = int(getattr(model.cfg, "d_vocab", -1))
    if output.shape[-1] != d_vocab:
        raise InputError(
            f"The model has no class head: it gives {output.shape[-1]} numbers at each of {output.shape[1]} positions. "
            "Load a classifier (saved as one, such as BertForSequenceClassification), or give a metric() of that "
            "output as target."
        )
    if fills_in_masks(model):
        raise InputError(
            "The model has no class head: it gives the logits of "
            f"{d_vocab} tokens at each position, to fill in masks. Load a classifier, or give "
            "token_logit(word, pos=...) as target."
        )
    chosen = int(output[0, -1].argmax()) if target is None else target
    return token_logit(chosen) if against is None else logit_difference(chosen, against)


def _of_classes(model: HookedModel, output: Float[Tensor, "1 class"], target: Any, against: Any) -> Metric:
    names, count = class_names(model), output.shape[-1]
    if against is None:
        chosen = int(output[0].argmax()) if target is None else _class(names, count, target, "target")
        return class_logit(chosen)
    if target is None:
        raise InputError(f"against={against!r} without a target: name the class that it is held against.")
    plus, minus = _class(names, count, target, "target"), _class(names, count, against, "against")
    if plus == minus:
        raise InputError(f"target and against are the same class, {target!r}.")
    return Metric(
        f"class_logit({plus}) - class_logit({minus})",
        lambda _model, _clean: lambda logits: logits[0, plus] - logits[0, minus],
    )


def _class(names: dict[int, str], count: int, given: Any, what: str) -> int:
    shown = ", ".join(f"{n} ({names[n]!r})" if n in names else str(n) for n in range(min(count, 20)))
    shown += f" … {count - 1}" if count > 20 else ""
    if isinstance(given, str):
        found = [n for n, name in names.items() if name.casefold() == given.casefold() and n < count]
        if len(found) == 1:
            return found[0]
    elif not isinstance(given, bool):
        with contextlib.suppress(TypeError):
            number = operator.index(given)
            if 0 <= number < count:
                return number
    raise InputError(f"{what}={given!r} is no class of this model: it has {shown}.")


def shown_class(model: HookedModel, name: str) -> str:
    """A target's name with the class's own where there is one, such as `class_logit(1) 'positive'`."""
    names = class_names(model)
    number = name.removeprefix("class_logit(").removesuffix(")")
    known = names.get(int(number)) if name.startswith("class_logit(") and number.isdigit() else None
    return name if known is None else f"{name} {known!r}"
