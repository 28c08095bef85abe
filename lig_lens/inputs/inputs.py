"""What a forward pass takes."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from lig_lens.errors import InputError


class Inputs(ABC):
    """One prompt as a model takes it, and what its positions are called.

    Attributes:
        tokens: a label for each position that contributes.
        special: whether a position holds something that is not the user's, such as [CLS].
        kept_as: key of a Flow's settings under which `record` is kept.
    """

    tokens: tuple[str, ...]
    special: tuple[bool, ...]
    kept_as: str

    def __len__(self) -> int:
        return len(self.tokens)

    @abstractmethod
    def arguments(self, batch: int = 1) -> tuple[Tensor, ...]:
        """Positional arguments of the model for a batch of `batch` items that are all this prompt."""

    def keywords(self, batch: int = 1) -> dict[str, Tensor]:
        """Keyword arguments of the model beside `arguments`; none by default."""
        return {}

    @property
    def dst_tokens(self) -> tuple[str, ...]:
        """A label for each position that is contributed to: the same, unless attention looks at another text."""
        return self.tokens

    @property
    def dst_special(self) -> tuple[bool, ...]:
        """The same for `special`."""
        return self.special

    def beside(self, other: Any) -> Any:
        """A second prompt as its user gave it, with what it may take over from this one."""
        return other

    def check_held(self, second: "Inputs") -> None:
        """Raise InputError if a second prompt differs in what no path passes; by default nothing is held."""
        return

    @abstractmethod
    def shortened(self) -> "Inputs":
        """A prompt of the same kind with as few positions as a model takes, to see how it treats a batch."""

    @abstractmethod
    def record(self) -> Any:
        """How a Flow keeps the prompt; JSON-able, and equal for equal prompts alone."""

    @property
    def shown(self) -> str:
        """The prompt in a few words, for messages."""
        return str(list(self.tokens[:8]) + ["…"] * (len(self) > 8))

    def check_joins(self, corrupted: "Inputs") -> None:
        """Raise InputError unless a path can join this prompt and a corrupted one position by position."""
        if len(self) == len(corrupted):
            return
        pairs = zip(self.tokens, corrupted.tokens, strict=False)
        part = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self), len(corrupted)))
        raise InputError(
            f"corrupted has {len(corrupted)} tokens, the prompt {len(self)}: a path joins them position by position, "
            f"so make them equally long. They part at position {part}: prompt {list(self.tokens[part : part + 3])}, "
            f"corrupted {list(corrupted.tokens[part : part + 3])}."
        )
