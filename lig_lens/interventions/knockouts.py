"""Edges taken out of the attention pattern, or taken from another run, one at a time."""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lig_lens.blocks.known import Needs
from lig_lens.blocks.messages import ROWS_MISS
from lig_lens.blocks.values import Messages, Values
from lig_lens.choose import Selection, chosen_numbers
from lig_lens.errors import InputError
from lig_lens.inputs.inputs import Inputs
from lig_lens.interventions.intervention import Change, Intervention, Trials, copies
from lig_lens.interventions.run import messages_at
from lig_lens.names import head_name

EdgeIndex = tuple[int, int, int, int]
"""Numbers of a layer, a head, a source and a destination."""


class Places(NamedTuple):
    """Edges of one block, one for each run."""

    head: Int[Tensor, "run"]
    src: Int[Tensor, "run"]
    dst: Int[Tensor, "run"]


@dataclass(frozen=True)
class KnockOut(Intervention):
    """What a head puts out at a destination lacks what one source sends: the pattern is 0 there.

    Attributes:
        edges: which; all that attention can see with None.
    """

    edges: Sequence[EdgeIndex] | None = None
    on = "edges"
    done = "knocked out"
    doing = "edge knock-outs"
    needs = Needs(formula=False, messages=True)

    @property
    def name(self) -> str:
        """See the base class."""
        return "edge knock-out"

    @property
    def renormalises(self) -> bool:
        """Whether what is left of the pattern's row is made to add up to 1."""
        return False

    def settings(self, prompts: Sequence[Inputs]) -> dict[str, object]:
        """See the base class."""
        prompt, *others = prompts
        corrupted = others[0].record() if others else None
        return {"prompt": prompt.record(), "corrupted": corrupted, "renormalise": self.renormalises}

    def left(self, into: Values, others: Sequence[Values], at: Places) -> Float[Tensor, "run d_head"]:
        """What each edge's head puts out at its destination in the run that is changed."""
        messages = _messages(into)
        return _sent(messages, _row_without(messages, at), at)

    def trials(self, into: Values, others: Sequence[Values]) -> Trials:
        """See the base class."""
        visible = _messages(into).pattern.mT > 0
        for other in others:
            _messages(other)
        places, z = self._places(into.layer, visible), into.heads.z

        def make(numbers: Int[Tensor, "run"]) -> Change:
            at = Places(*places[numbers].T)
            changed, run = copies(z, numbers)
            changed[run, at.dst, at.head] = self.left(into, others, at)
            return Change(z=changed)

        return _AtEdges((len(places),), make, places, tuple(visible.shape))

    def _places(self, layer: int, visible: Bool[Tensor, "head src dst"]) -> Int[Tensor, "edge 3"]:
        """Edges `(head, src, dst)` of a block.

        Raises:
            InputError: one that was asked for does not exist.
        """
        if self.edges is None:
            return visible.nonzero()
        named = [edge for edge in self.edges if edge[0] == layer]
        for edge in named:
            _check_visible(edge, visible)
        return torch.tensor([edge[1:] for edge in named], dtype=torch.long, device=visible.device).reshape(-1, 3)


@dataclass(frozen=True)
class RenormalisedKnockOut(KnockOut):
    """As if the source could not be seen: what is left of the pattern's row adds up to 1 again, with what a sink has.

    A row's only edge stays, with effect 0.
    """

    @property
    def name(self) -> str:
        """See the base class."""
        return "edge knock-out, renormalised"

    @property
    def renormalises(self) -> bool:
        """See the base class."""
        return True

    def left(self, into: Values, others: Sequence[Values], at: Places) -> Float[Tensor, "run d_head"]:
        """See the base class."""
        messages = _messages(into)
        row = _row_without(messages, at)
        rest = row.sum(-1, keepdim=True) + _of_sink(messages)[at.head, at.dst][:, None]
        return torch.where(rest > 0, _sent(messages, row, at) / rest.clamp(min=1e-30), into.heads.z[at.dst, at.head])


@dataclass(frozen=True)
class EdgePatch(KnockOut):
    """An edge carries what it carries in the other run, pattern entry times value."""

    done = "patched"

    @property
    def name(self) -> str:
        """See the base class."""
        return "edge patching"

    def left(self, into: Values, others: Sequence[Values], at: Places) -> Float[Tensor, "run d_head"]:
        """See the base class."""
        (source,) = others
        other = _messages(source)
        message = other.pattern[at.head, at.dst, at.src][:, None] * other.values[at.src, at.head]
        return super().left(into, others, at) + message


@dataclass(frozen=True)
class _AtEdges(Trials):
    """Trials that leave most of a block's edges unmeasured (NaN)."""

    places: Int[Tensor, "edge 3"] = field(repr=False)
    grid: tuple[int, ...]

    def arranged(self, found: Float[Tensor, "run"]) -> Float[Tensor, "head src dst"]:
        """See the base class."""
        values = torch.full(self.grid, torch.nan, dtype=found.dtype)
        values[tuple(self.places.T.cpu())] = found
        return values


def _messages(values: Values) -> Messages:
    return messages_at(
        values,
        "its edges cannot be knocked out. Heads and residual stream can still be patched (patch, ablate).",
    )


def _row_without(messages: Messages, at: Places) -> Float[Tensor, "run src"]:
    """Rows of the pattern without the edges."""
    return messages.pattern[at.head, at.dst].scatter(1, at.src[:, None], 0.0)


def _of_sink(messages: Messages) -> Float[Tensor, "head dst"]:
    """What a sink has of each row; 0 in heads without one, whose rows miss 1 by rounding alone."""
    lost = (1 - messages.pattern.sum(-1)).clamp(min=0)
    return lost * (lost > ROWS_MISS).any(-1, keepdim=True)


def _sent(messages: Messages, row: Float[Tensor, "run src"], at: Places) -> Float[Tensor, "run d_head"]:
    """What rows of the pattern make of the values: from what is left, since one token may have nearly all of a row."""
    return torch.einsum("es,seh->eh", row, messages.values[:, at.head])


def _check_visible(edge: EdgeIndex, visible: Bool[Tensor, "head src dst"]) -> None:
    layer, head, src, dst = edge
    n_heads, n_pos = visible.shape[:2]
    if not (0 <= head < n_heads and 0 <= src < n_pos and 0 <= dst < n_pos):
        raise InputError(
            f"Edge {edge} does not exist: block {layer} has heads 0 to {n_heads - 1}, and the prompt positions 0 to "
            f"{n_pos - 1}."
        )
    if not bool(visible[head, src, dst]):
        raise InputError(
            f"Edge {edge} does not exist: {head_name(layer, head)} cannot see source {src} from destination {dst}"
            + (" (attention is causal)." if src > dst else " (its pattern is 0 there).")
        )


def chosen_edges(
    edges: object, layers: Selection, n_layers: int
) -> tuple[tuple[EdgeIndex, ...] | None, tuple[int, ...]]:
    """Edges as users name them, each once and in order, and the layers that effects are wanted for.

    Args:
        edges: `(layer, head, src, dst)`; None for all.
        layers: those of the edges with None, or all.
        n_layers: of the model.

    Raises:
        InputError: none, one that is not four whole numbers, or layers that leave out some of them.
    """
    if edges is None:
        return None, chosen_numbers("layer", layers, n_layers)
    if not isinstance(edges, Iterable) or isinstance(edges, (str, bytes)) or getattr(edges, "ndim", 1) == 0:
        raise InputError(f"edges={edges!r}: give a list of (layer, head, src, dst), such as top_edges(flow, 200).")
    wanted = tuple(sorted({_whole(edge, n_layers) for edge in edges}))
    if not wanted:
        raise InputError("edges is empty: name at least one as (layer, head, src, dst), or leave it out for all.")
    named = sorted({edge[0] for edge in wanted})
    chosen = chosen_numbers("layer", named if layers is None else layers, n_layers)
    if not set(named) <= set(chosen):
        raise InputError(f"edges are in the layers {named}, and layers={list(chosen)}: name all of them, or none.")
    return wanted, chosen


def _whole(edge: object, n_layers: int) -> EdgeIndex:
    try:
        layer, head, src, dst = (operator.index(n) for n in (edge if isinstance(edge, Iterable) else ()))
    except (TypeError, ValueError) as error:
        raise InputError(f"Edge {edge!r} is not (layer, head, src, dst), four whole numbers.") from error
    (layer,) = chosen_numbers("layer", layer, n_layers)
    return layer, head, src, dst
