"""Relevance: what one method says the positions of one prompt do to one number of a model's output."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lig_lens.arguments import checked
from lig_lens.errors import InputError

# Tensors beside `scores`, with their axes; a method fills in those that it has.
AXES: dict[str, tuple[str, ...]] = {
    "scores": ("pos",),
    "rolled": ("layer", "pos"),
    "token": ("boundary", "pos"),
    "attention": ("layer", "head", "src", "dst"),
    "fused": ("layer", "src", "dst"),
    "total": ("boundary",),
    "gap": ("boundary",),
    "converged": ("boundary",),
}


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Relevance:
    """What the positions of a prompt do to one number of the model's output, by one method.

    Axes run `layer head src dst`, as in a Flow. A `boundary` is where residual vectors enter a block, under that
    block's number, or where they leave the last. Positive is what raises the number.

    Attributes:
        scores: the method's answer, one number for each position.
        tokens: one label for each position.
        special: whether a position holds something that is not the user's, such as [CLS].
        layers: block numbers.
        boundaries: those that the boundary axis stands for; the number of blocks is what leaves the last.
        method: its name.
        target: name of the number that is explained.
        value: that number on the prompt.
        reference: the same on the baseline's prompt, where there is one.
        model_name: what the model is called.
        settings: parameters of the method, the baseline and the prompt; JSON-able.
        rolled: relevance followed back through the layers, as it enters each of them; the first row is `scores`.
        token: what the vectors at each boundary contribute.
        attention: what each edge of attention is worth, source before destination (TransformerLens' patterns have the
            destination first).
        fused: what of the relevance at a destination, behind a block, goes to a source before it.
        total: what `token` has to add up to at each boundary: the change of the number along the path, or, of methods
            that propagate, the number less what biases and the like keep behind the boundary.
        gap: how far it is from that, relative.
        converged: whether gap and estimated errors are within the tolerance.

    Raises:
        InputError: shapes that do not belong to the labels.
    """

    scores: Float[Tensor, "pos"]
    tokens: tuple[str, ...]
    special: tuple[bool, ...]
    layers: tuple[int, ...]
    boundaries: tuple[int, ...] = ()
    method: str
    target: str
    value: float
    reference: float | None = None
    model_name: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    rolled: Float[Tensor, "layer pos"] | None = None
    token: Float[Tensor, "boundary pos"] | None = None
    attention: Float[Tensor, "layer head src dst"] | None = None
    fused: Float[Tensor, "layer src dst"] | None = None
    total: Float[Tensor, "boundary"] | None = None
    gap: Float[Tensor, "boundary"] | None = None
    converged: Bool[Tensor, "boundary"] | None = None

    def __post_init__(self) -> None:
        n_pos, n_layers = len(self.tokens), len(self.layers)
        sizes = {"pos": n_pos, "src": n_pos, "dst": n_pos, "layer": n_layers, "boundary": len(self.boundaries)}
        for name, axes in AXES.items():
            value = getattr(self, name)
            if value is None:
                continue
            dtype = torch.bool if name == "converged" else torch.float32
            object.__setattr__(self, name, value.detach().to("cpu", dtype).contiguous())
            expected = tuple(sizes.get(axis, -1) for axis in axes)
            fits = len(expected) == value.ndim and all(
                want in (-1, size) for want, size in zip(expected, value.shape, strict=True)
            )
            if not fits:
                raise InputError(
                    f"Relevance: {name} has shape {list(value.shape)}, expected [{', '.join(axes)}] for {n_layers} "
                    f"layers and {n_pos} tokens."
                )
        if len(self.special) != n_pos:
            raise InputError(f"Relevance: special has {len(self.special)} entries for {n_pos} tokens.")

    @property
    def words(self) -> tuple[tuple[int, str, float], ...]:
        """Position, label and score of every position that is not special, in order."""
        kept = [number for number, special in enumerate(self.special) if not special]
        return tuple((number, self.tokens[number], float(self.scores[number])) for number in kept)

    @checked
    def top(self, k: int = 10) -> list[tuple[int, str, float]]:
        """Position, label and score of the k positions with the largest scores in absolute value.

        Raises:
            InputError: k below 1.
        """
        if k < 1:
            raise InputError(f"top: k is {k}: ask for at least 1.")
        order = torch.sort(self.scores.abs(), descending=True, stable=True).indices[:k].tolist()
        return [(number, self.tokens[number], float(self.scores[number])) for number in order]

    def worst_gap(self) -> float | None:
        """Largest relative gap of all boundaries; None where nothing has to add up."""
        return None if self.gap is None else float(self.gap.max())

    def __repr__(self) -> str:
        gap = "" if self.gap is None else f", gap ≤ {self.worst_gap():.1e}"
        change = f"{self.value:.4g}" + ("" if self.reference is None else f" from {self.reference:.4g}")
        return f"Relevance({self.method} of {self.target} = {change}: {len(self.tokens)} tokens{gap})"
