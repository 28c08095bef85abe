"""What a forward pass takes."""

from abc import ABC, abstractmethod

from torch import Tensor


class Inputs(ABC):
    """One prompt as a model takes it, and what its positions are called.

    Attributes:
        tokens: a label for each position.
        special: whether a position holds something that is not the user's, such as [CLS].
    """

    tokens: tuple[str, ...]
    special: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    @abstractmethod
    def arguments(self, batch: int = 1) -> tuple[Tensor, ...]:
        """Positional arguments of the model for a batch of `batch` items that are all this prompt."""

    @abstractmethod
    def shortened(self) -> "Inputs":
        """A prompt of the same kind with as few positions as a model takes, to see how it treats a batch."""

    @abstractmethod
    def record(self) -> list[int]:
        """How a Flow keeps the prompt; JSON-able."""
