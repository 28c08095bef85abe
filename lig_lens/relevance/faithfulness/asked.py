"""What `faithfulness` is asked: methods, replacers, measures and fractions as users name them."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from jaxtyping import Float

from lig_lens.errors import InputError
from lig_lens.hooked import HookedModel
from lig_lens.inputs.pixels import Pixels
from lig_lens.registry import Registry
from lig_lens.relevance import METHODS
from lig_lens.relevance.faithfulness import IMAGE_REPLACERS, MEASURES, TEXT_REPLACERS
from lig_lens.relevance.faithfulness.case import Subject
from lig_lens.relevance.faithfulness.measure import Measure, label_of, named
from lig_lens.relevance.faithfulness.replacers import Replacer
from lig_lens.relevance.method import Method, made
from lig_lens.relevance.relevance import Relevance
from lig_lens.relevance.targets import shown_class

_BY_BOTH = ("leave_one_out", "shapley")  # asked for by rank and by value, unless measures are named


def read_methods(given: Any) -> dict[str, Any]:
    """What explains, by label: `Method`s, or what was explained before."""
    if isinstance(given, (str, Method)):
        given = [given]
    if not isinstance(given, Mapping):
        given = [one for name in given for one in (METHODS.names() if name == "all" else [name])]
    pairs = given.items() if isinstance(given, Mapping) else ((None, one) for one in given)
    found: dict[str, Any] = {}
    for label, one in pairs:
        if isinstance(one, str):
            name, parameters = named(one)
            method: Any = made(METHODS.home(name), parameters)
        elif isinstance(one, Method) or (label is not None and isinstance(one, Sequence)):
            method = one
        else:
            raise InputError(
                f"methods: {type(one).__name__} is none: give a name such as 'ca_lig mix=0.25', a Method, or, in a "
                "dictionary, a Relevance for each input."
            )
        label = label or label_of(method)
        if label in found:
            raise InputError(f"The method {label!r} is given twice: name each once, or label them in a dictionary.")
        found[label] = method
    if not found:
        raise InputError(f"methods is empty: name some of {', '.join(METHODS.names())}.")
    return found


def read_measures(given: Any, with_lexicon: bool) -> list[Measure]:
    """What is measured."""
    if given is None:
        usual = [name for name in MEASURES.names() if with_lexicon or not name.startswith("lexicon")]
        given = [text for name in usual for text in (name, f"{name} by=pearson")[: 1 + (name in _BY_BOTH)]]
    found: dict[str, Measure] = {}
    for one in [given] if isinstance(given, (str, Measure)) else given:
        if isinstance(one, str):
            name, parameters = named(one)
            one = cast(Measure, made(MEASURES.home(name), parameters, "measure"))
        if not isinstance(one, Measure):
            raise InputError(f"measures: {type(one).__name__} is none: give one of {', '.join(MEASURES.names())}.")
        if one.label in found:
            raise InputError(f"The measure {one.label!r} is given twice: name each once.")
        found[one.label] = one
    if not found:
        raise InputError(f"measures is empty: name some of {', '.join(MEASURES.names())}.")
    return list(found.values())


def read_fractions(given: Any) -> tuple[float, ...]:
    """Shares of the positions, in order, each once."""
    try:
        found = tuple(sorted({float(one) for one in given}))
    except (TypeError, ValueError) as error:
        raise InputError(f"fractions={given!r}: give shares such as (0.1, 0.2, 0.5).") from error
    wrong = [one for one in found if not 0 < one < 1]
    if wrong or not found:
        said = f"holds {wrong[0]:g}" if wrong else "is empty"
        raise InputError(f"fractions {said}: give shares of the positions above 0 and below 1, such as (0.1, 0.5).")
    return found


def read_replacers(
    model: HookedModel, subjects: Sequence[Subject], given: Any, left_out: dict[str, str]
) -> list[Replacer]:
    """Replacers that the inputs allow; of those that were not named, the others are left out."""
    image = isinstance(subjects[0].inputs, Pixels)
    known, others = (IMAGE_REPLACERS, TEXT_REPLACERS) if image else (TEXT_REPLACERS, IMAGE_REPLACERS)
    found: dict[str, Replacer] = {}
    wanted: Sequence[Any] = known.names() if given is None else [given] if isinstance(given, (str, Replacer)) else given
    for one in wanted:
        try:
            replacer = one if isinstance(one, Replacer) else _replacer(model, one, known, others, image)
            for subject in subjects:
                replacer.check(subject.inputs)
        except InputError as error:
            if given is not None:
                raise
            left_out[one] = str(error)
            continue
        if replacer.name in found:
            raise InputError(f"The replacer {replacer.name!r} is given twice: name each once.")
        found[replacer.name] = replacer
    if not found:
        raise InputError(f"replacers is empty: name some of {', '.join(known.names())}.")
    return list(found.values())


def _replacer(model: HookedModel, name: Any, known: Registry[Any], others: Registry[Any], image: bool) -> Replacer:
    if name in others.names() and name not in known.names():
        kinds = ("texts", "images") if image else ("images", "texts")
        raise InputError(
            f"The replacer {name!r} goes with {kinds[0]}, and these are {kinds[1]}: use some of "
            f"{', '.join(map(repr, known.names()))}."
        )
    replacer: Replacer = known.home(name)(model, name)
    return replacer


def read_given(
    model: HookedModel, label: str, relevances: Sequence[Any], subjects: Sequence[Subject]
) -> list[Float[np.ndarray, "_"]]:
    """Scores that were explained before."""
    if len(relevances) != len(subjects):
        raise InputError(f"methods: {label!r} has {len(relevances)} entries for {len(subjects)} inputs: give one each.")
    found = []
    for one, subject in zip(relevances, subjects, strict=True):
        if isinstance(one, Relevance):
            name = shown_class(model, f"class_logit({subject.target})")
            if one.target != name:
                raise InputError(
                    f"methods: {label!r} explains {one.target} of input {subject.number}, and the model predicts "
                    f"{name}: explain the predicted class (target=None)."
                )
            if one.settings.get(subject.inputs.kept_as) != subject.inputs.record():
                raise InputError(
                    f"methods: {label!r} explains another prompt than input {subject.number}: give one Relevance for "
                    "each input, in their order."
                )
        scores = one.scores if isinstance(one, Relevance) else one
        try:
            found.append(np.asarray(scores, dtype=np.float64))
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"methods: {label!r} has no scores for input {subject.number}: {error}") from error
        if found[-1].shape != (len(subject.inputs),) or not np.isfinite(found[-1]).all():
            raise InputError(
                f"methods: {label!r} has scores of shape {list(found[-1].shape)} for the {len(subject.inputs)} "
                f"positions of input {subject.number}, special ones too: give one finite number for each."
            )
    return found
