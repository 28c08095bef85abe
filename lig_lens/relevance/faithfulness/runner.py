"""Runs a model on many inputs with many sets of positions removed, each once."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float

from lig_lens.errors import NonFiniteError
from lig_lens.models.running import first_tensor, module_hooks
from lig_lens.relevance.faithfulness.case import Subject
from lig_lens.relevance.faithfulness.replacers import Replacer

Sets = Bool[np.ndarray, "variant pos"]


class Runner:
    """Logits of some inputs without some of their positions, for one replacer.

    Ask for sets first, `run` once, then look logits up: what was asked for by several is run once, and variants of all
    inputs run together. Use it inside `prepared(model, model)`.
    """

    def __init__(self, replacer: Replacer, subjects: Sequence[Subject]) -> None:
        """Hold what runs.

        Raises:
            InputError: positions of an input cannot be removed in this way.
        """
        for subject in subjects:
            replacer.check(subject.inputs)
        self.replacer, self.subjects = replacer, {one.number: one for one in subjects}
        self._asked: dict[tuple[int, bytes], np.ndarray] = {}
        self._found: dict[tuple[int, bytes], np.ndarray] = {}

    def ask(self, subject: Subject, removed: Sets) -> None:
        """Note sets of positions that are to be removed from an input."""
        for one in removed:
            key = (subject.number, np.packbits(one).tobytes())
            if key not in self._found:
                self._asked[key] = one

    def logits(self, subject: Subject, removed: Sets) -> Float[np.ndarray, "variant class"]:
        """Logits without sets of positions that were asked for."""
        found = [self._found[subject.number, np.packbits(one).tobytes()] for one in removed]
        return np.array(found).reshape(len(found), -1)

    @property
    def waiting(self) -> int:
        """How many runs there are to do."""
        return len(self._asked)

    @torch.no_grad()
    def run(self, max_batch_tokens: int, advance: Callable[[int], object] = lambda _: None) -> None:
        """Run what was asked for.

        Args:
            max_batch_tokens: positions that are run at once; bounds memory, changes nothing else.
            advance: told how many runs are done.

        Raises:
            NonFiniteError: the model gives NaN or infinite logits.
        """
        groups: dict[tuple[int, torch.Size], list[tuple[int, bytes]]] = defaultdict(list)
        for key, removed in self._asked.items():
            inputs = self.subjects[key[0]].inputs
            size = self.replacer.size(inputs, int(removed.sum()))
            groups[size, inputs.arguments()[0].shape[2:]].append(key)
        for (size, _), keys in groups.items():
            count = max(1, max_batch_tokens // size)
            for first in range(0, len(keys), count):
                some = keys[first : first + count]
                for key, one in zip(some, self._batch(some), strict=True):
                    self._found[key] = one
                advance(len(some))
        self._asked.clear()

    def _batch(self, keys: Sequence[tuple[int, bytes]]) -> Float[np.ndarray, "batch class"]:
        removed = [torch.from_numpy(self._asked[key]) for key in keys]
        rows = [
            self.replacer.row(self.subjects[number].inputs, one) for (number, _), one in zip(keys, removed, strict=True)
        ]
        given = [self.subjects[number].inputs.keywords() for number, _ in keys]
        keywords = {name: torch.cat([one[name] for one in given]) for name in given[0]}
        with module_hooks(self.replacer.hooks(removed)):
            logits = first_tensor(self.replacer.model(torch.cat(rows), **keywords))
        if not bool(logits.isfinite().all()):
            number = keys[int((~logits.isfinite()).any(-1).nonzero()[0, 0])][0]
            raise NonFiniteError(
                f"The model gives NaN or infinite logits for input {number} with positions replaced by "
                f"{self.replacer.name!r}: leave that replacer out."
            )
        found: np.ndarray = logits.double().cpu().numpy()
        return found
