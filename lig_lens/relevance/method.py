"""What a method is: parameters, what it needs, and its answer."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from jaxtyping import Bool, Float
from torch import Tensor

from lig_lens.arguments import checked
from lig_lens.errors import InputError, check_choice
from lig_lens.relevance.explained import Explained

Advance = Callable[[], object]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What a method found; see `Relevance` for shapes, signs and meaning."""

    scores: Float[Tensor, "pos"]
    boundaries: tuple[int, ...] = ()
    rolled: Float[Tensor, "layer pos"] | None = None
    token: Float[Tensor, "boundary pos"] | None = None
    attention: Float[Tensor, "layer head src dst"] | None = None
    fused: Float[Tensor, "layer src dst"] | None = None
    total: Float[Tensor, "boundary"] | None = None
    gap: Float[Tensor, "boundary"] | None = None
    converged: Bool[Tensor, "boundary"] | None = None


class Method(ABC):
    """One way of explaining a number: a frozen dataclass whose fields are its parameters.

    Each is a file of this room and a line in `__init__.py`.
    """

    name: ClassVar[str]
    needs_heads: ClassVar[bool] = True
    """Whether it reads attention: patterns, values, head outputs."""
    needs_start: ClassVar[bool] = False
    """Whether it needs a baseline, where paths start."""
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {}
    """What parameters that are one of some names may be."""

    def __post_init__(self) -> None:
        for name, choices in self.CHOICES.items():
            check_choice(name, getattr(self, name), choices)

    @abstractmethod
    def explain(self, what: Explained, advance: Advance) -> Answer:
        """Explain a number.

        Args:
            what: the number, and the model's run.
            advance: to be called `steps` times while it works.
        """

    def steps(self, n_layers: int) -> int:
        """How often it tells that it has got further."""
        return 0

    def record(self) -> dict[str, Any]:
        """Parameters, as results keep them."""
        return {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}  # type: ignore[arg-type]


_N = TypeVar("_N")


def made(kind: type[_N], options: dict[str, Any], what: str = "method") -> _N:
    """A method, or something else that is a dataclass with a name, with parameters.

    Raises:
        InputError: a parameter that it does not have, or not such a value.
    """
    known = [one.name for one in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in options:
        if name not in known:
            takes = f"takes {', '.join(known)}" if known else "takes no parameters"
            called = getattr(kind, "name", kind.__name__)
            raise InputError(f"The {what} {called!r} has no parameter {name!r}: it {takes}.")
    return checked(kind)(**options)
