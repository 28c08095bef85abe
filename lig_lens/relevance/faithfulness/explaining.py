"""Methods at work on many inputs: what cannot be explained is left out with its reason."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from lig_lens.errors import (
    BoundaryError,
    CancellationWarning,
    CollapseWarning,
    ConvergenceWarning,
    InputError,
    NonFiniteError,
)
from lig_lens.hooked import HookedModel, lists_of_blocks
from lig_lens.relevance.explain import explain_class
from lig_lens.relevance.explained import Explained
from lig_lens.relevance.faithfulness.case import Subject
from lig_lens.relevance.method import Advance, Answer, Method
from lig_lens.relevance.relevance import Relevance

_CANNOT = (InputError, BoundaryError, NonFiniteError)
Scores = Float[np.ndarray, "pos"]


class Explaining:
    """Methods, and a model whose classes they explain.

    Attributes:
        seed: of random weights.
        labels: of the methods.
        left_out: of methods that cannot explain, why.
        missed: of methods, numbers of the inputs for which something missed the tolerance.
    """

    def __init__(
        self, model: HookedModel, methods: Mapping[str, Method], seed: int, options: Mapping[str, Any]
    ) -> None:
        """Hold what explains.

        Args:
            model: a classifier.
            methods: by label.
            seed: of random weights.
            options: of `explain_class`.
        """
        self.model, self.methods, self.options, self.seed = model, dict(methods), dict(options), seed
        self.labels = tuple(methods)
        self.left_out: dict[str, str] = {}
        self.missed: dict[str, set[int]] = {label: set() for label in methods}

    def explain(self, subject: Subject, labels: Sequence[str]) -> dict[str, Scores]:
        """Scores of an input's positions towards its class, by method; without methods that are left out."""
        wanted = [label for label in labels if label not in self.left_out]
        if not wanted:
            return {}
        try:
            found = self._explain(subject, wanted)
        except _CANNOT as error:
            if len(wanted) > 1:  # one of them cannot, and the others can
                return {label: one for name in wanted for label, one in self.explain(subject, [name]).items()}
            self.left_out[wanted[0]] = f"input {subject.number}: {error}"
            return {}
        return {label: one.scores.double().numpy() for label, one in zip(wanted, found, strict=True)}

    def _explain(self, subject: Subject, labels: Sequence[str]) -> list[Relevance]:
        watched = [_Watched(self.methods[label]) for label in labels]
        with warnings.catch_warnings():
            for kind in (CancellationWarning, CollapseWarning, ConvergenceWarning):
                warnings.simplefilter("ignore", kind)  # of what missed tol one warning for all comes at the end
            found = explain_class(
                self.model,
                subject.prompt,
                target=subject.target,
                method=watched,
                progress=False,
                **self.options,
            )
        for label, method, one in zip(labels, watched, cast(list[Relevance], found), strict=True):
            if method.missed or (one.converged is not None and not bool(one.converged.all())):
                self.missed[label].add(subject.number)
            if not bool(one.scores.isfinite().all()):
                raise NonFiniteError(f"{one.method} gives scores that are NaN or infinite.")
        return cast(list[Relevance], found)

    @contextlib.contextmanager
    def randomized(self, share: float) -> Iterator[None]:
        """Put random weights into the last share of the blocks and all that follows; what fails there is not kept."""
        blocks = [block for some in lists_of_blocks(self.model).values() for block in some]
        left_out, missed = dict(self.left_out), {label: set(some) for label, some in self.missed.items()}
        with random_weights(self.model, blocks[round(len(blocks) * (1 - share)) :], blocks, self.seed):
            try:
                yield
            finally:
                self.left_out, self.missed = left_out, missed


class _Watched(Method):
    """A method, and whether it warned that something missed the tolerance: not all of that is in its answer."""

    def __init__(self, method: Method) -> None:
        self.method, self.missed = method, False
        vars(self).update({name: getattr(method, name) for name in ("name", "needs_heads", "needs_start")})

    def explain(self, what: Explained, advance: Advance) -> Answer:
        """See the base class."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            answer = self.method.explain(what, advance)
        for one in caught:
            if issubclass(one.category, ConvergenceWarning):
                self.missed = True
            else:
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        return answer

    def steps(self, n_layers: int) -> int:
        """See the base class."""
        return self.method.steps(n_layers)

    def record(self) -> dict[str, Any]:
        """See the base class."""
        return self.method.record()


@contextlib.contextmanager
def random_weights(
    model: HookedModel, chosen: Sequence[nn.Module], blocks: Sequence[nn.Module], seed: int
) -> Iterator[None]:
    """Draw the weights of some blocks, and those of what stands behind all blocks, anew, and put them back at the end.

    From a normal distribution with the mean and standard deviation that each tensor has, so that norms stay norms.

    Args:
        model: whose weights they are.
        chosen: the last blocks, or none.
        blocks: all blocks.
        seed: of the draw.
    """
    weights = list(model.parameters())  # in the order in which the model registers them: embeddings, blocks, head
    of_blocks = {id(one) for block in blocks for one in block.parameters()}
    wanted = {id(one) for block in chosen for one in block.parameters()}
    behind = 1 + max((number for number, one in enumerate(weights) if id(one) in of_blocks), default=-1)
    wanted |= {id(one) for one in weights[behind:]}
    if not any(one.ndim > 1 for one in weights[behind:]):
        raise InputError("The model registers no head behind its blocks: leave the measure 'randomization' out.")
    saved = [(one, one.data) for one in weights if id(one) in wanted and one.is_floating_point()]
    generator = torch.Generator().manual_seed(seed)
    try:
        for one, data in saved:
            mean, spread = data.float().mean(), data.float().std(correction=0)
            drawn = torch.randn(data.shape, generator=generator).to(mean.device) * spread + mean
            one.data = drawn.to(data)
        yield
    finally:
        for one, data in saved:
            one.data = data
