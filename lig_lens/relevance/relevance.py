"""Relevance: what one method says the positions of one prompt do to one number of a model's output."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

import lig_lens
from lig_lens.arguments import checked
from lig_lens.errors import InputError, RelevanceFileError, optional
from lig_lens.names import patch_place
from lig_lens.relevance.header import KIND, LABELS
from lig_lens.stored import nested, write_json

if TYPE_CHECKING:
    import pandas

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


def _dtype(name: str) -> torch.dtype:
    return torch.bool if name == "converged" else torch.float32


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
        InputError: shapes that do not belong to the labels, or settings that JSON cannot hold.
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
            object.__setattr__(self, name, value.detach().to("cpu", _dtype(name)).contiguous())
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
        try:
            json.dumps([self.settings, self.value, self.reference], allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"Relevance cannot be written as JSON ({error}): use plain values.") from error

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

    @property
    def of_image(self) -> bool:
        """Whether positions are patches of an image."""
        return any(patch_place(token) is not None for token in self.tokens)

    @checked
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write tensors and labels to a safetensors file with a JSON header, in one step (never pickle).

        Raises:
            InputError: `path` cannot be written.
        """
        return KIND.write(path, self._labels(), self._tensors())

    @classmethod
    @checked
    def load(cls, path: str | os.PathLike[str]) -> "Relevance":
        """Read a Relevance that `save` wrote.

        Raises:
            RelevanceFileError: no such file, a damaged one, one that is no Relevance, or one with a newer schema.
        """
        stored, shown = KIND.read(path), repr(os.fspath(path))
        for name, tensor in stored.tensors.items():
            if name not in AXES or tensor.dtype != _dtype(name):
                raise RelevanceFileError(
                    f"{shown} holds an unexpected tensor {name!r} ({tensor.dtype}): it is damaged. Save the Relevance "
                    "again."
                )
        if "scores" not in stored.tensors:
            raise RelevanceFileError(f"{shown} is damaged: it has no scores. Save the Relevance again.")
        try:
            fields: dict[str, Any] = {name: getattr(stored.header, name) for name in LABELS}
            return cls(**fields | stored.tensors)
        except InputError as error:
            raise RelevanceFileError(f"{shown} is damaged ({error}) Save the Relevance again.") from error

    @checked
    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Everything as JSON text, schema `lig_lens.relevance` version 1; also written to `path`, if given.

        Labels, and `tensors`: for each that there is its `axes` and nested `values`.

        Raises:
            InputError: `path` cannot be written.
        """
        tensors = {name: {"axes": AXES[name], "values": nested(one)} for name, one in self._tensors().items()}
        return write_json({**KIND.labelled(self._labels()), "tensors": tensors}, path)

    @checked
    def to_dataframe(self, layers: bool = False) -> "pandas.DataFrame":
        """One row per position: position, token, special, score.

        Args:
            layers: add columns `rolled_0`, … and `token_0`, … for each layer and boundary that there is.

        Raises:
            MissingPackageError: pandas is not installed (`pip install pandas`).
        """
        columns: dict[str, Any] = {
            "position": range(len(self.tokens)),
            "token": self.tokens,
            "special": self.special,
            "score": self.scores.numpy().copy(),
        }
        if layers:
            for name, numbers in (("rolled", self.layers), ("token", self.boundaries)):
                rows = getattr(self, name)
                if rows is not None:
                    columns |= {f"{name}_{n}": row.numpy().copy() for n, row in zip(numbers, rows, strict=True)}
        frame: pandas.DataFrame = optional("pandas", "Relevance.to_dataframe").DataFrame(columns)
        return frame

    @checked
    def table(self, k: int | None = None) -> str:
        """What positions do, in lines to be printed; see `lig_lens.relevance_table`.

        Args:
            k: positions to show, those with the largest scores in absolute value; all by default.

        Raises:
            InputError: k below 1.
        """
        # A step up, as in `explore`: the package resolves the names when they are asked for.
        return lig_lens.relevance_table(self, k)

    @checked
    def explore(self, height: int = 700) -> "lig_lens.Explorer":
        """Make a page to explore this Relevance in; a notebook shows it, `.save(path)` writes it.

        Args:
            height: of the frame in a notebook, in pixels.
        """
        return lig_lens.explore(self, height=height)

    def _repr_html_(self) -> str | None:
        """What a notebook shows: the text, coloured; None of images, of which it shows `repr`."""
        return None if self.of_image else lig_lens.relevance_html(self).html

    def _labels(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in LABELS}

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in AXES if getattr(self, name) is not None}

    def __repr__(self) -> str:
        gap = "" if self.gap is None else f", gap ≤ {self.worst_gap():.1e}"
        change = f"{self.value:.4g}" + ("" if self.reference is None else f" from {self.reference:.4g}")
        return f"Relevance({self.method} of {self.target} = {change}: {len(self.tokens)} tokens{gap})"
