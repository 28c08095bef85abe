"""Naive oracle of what explains a class: plain transformers classifiers in float64, no code of the package."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from checkpoints import GPT2, GQA, SMALL, saved
from image_models import CLASSES
from torch import Tensor

KINDS: dict[str, dict[str, Any]] = {
    "BertForSequenceClassification": {**SMALL, "num_labels": 3},
    "GPT2ForSequenceClassification": {**GPT2, "num_labels": 3, "pad_token_id": 0},
    "LlamaForSequenceClassification": {**GQA, "num_labels": 3},
    "ViTForImageClassification": CLASSES,
}
# In the order in which a path of names leads to the blocks.
_BLOCKS = ("encoder.layer", "h", "layers", "encoder.layers")

Function = Callable[[Tensor], Tensor]
"""Of the logits [batch, class]; gives one number for each."""


class ClassOracle:
    """A plain classifier of its own, loaded from a checkpoint in float64."""

    def __init__(self, kind: str, folder: Path, seed: int = 0) -> None:
        saved(kind, folder, seed, **KINDS[kind])
        self.folder, self.kind = folder, kind
        loaded = getattr(transformers, kind).from_pretrained(folder, attn_implementation="eager")
        self.model = loaded.double().eval()
        body: Any = self.model.base_model
        for path in _BLOCKS:
            found = body
            for name in path.split("."):
                found = getattr(found, name, None)
            if found is not None:
                self.blocks = list(found)
                break

    def __call__(
        self, prompt: Tensor, layer: int = -1, resid: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits and attention patterns [head, dst, src] of one prompt; with `resid` entering at a boundary."""
        handles = []
        if resid is not None and layer < len(self.blocks):
            enter = lambda _m, args, kwargs: ((resid[None], *args[1:]), kwargs)  # noqa: E731
            handles.append(self.blocks[layer].register_forward_pre_hook(enter, with_kwargs=True))
        elif resid is not None:
            leave = lambda _m, _a, out: (resid[None], *out[1:]) if isinstance(out, tuple) else resid[None]  # noqa: E731
            handles.append(self.blocks[-1].register_forward_hook(leave))
        try:
            out = self.model(prompt[None], output_attentions=True)
        finally:
            for handle in handles:
                handle.remove()
        return out.logits, out.attentions

    def resid(self, prompt: Tensor) -> list[Tensor]:
        """Vectors that enter each block, and those that leave the last, [pos, d_model]."""
        seen: list[Tensor] = []
        handles = [
            block.register_forward_pre_hook(lambda _m, args, kwargs: seen.append(args[0][0]), with_kwargs=True)
            for block in self.blocks
        ]
        last = self.blocks[-1].register_forward_hook(
            lambda _m, _a, out: seen.append((out[0] if isinstance(out, tuple) else out)[0])
        )
        with torch.no_grad():
            self.model(prompt[None])
        for handle in (*handles, last):
            handle.remove()
        return [one.detach() for one in seen]

    def token_relevance(self, prompt: Tensor, start: list[Tensor], f: Function, boundary: int, n: int = 200) -> Tensor:
        """Contributions of positions along the straight path from `start` at one boundary."""
        end, nodes = self.resid(prompt)[boundary], _rule(n)
        step, total = end - start[boundary], torch.zeros(len(end), dtype=torch.float64)
        for a, weight in nodes:
            leaf = (start[boundary] + a * step).requires_grad_()
            (gradient,) = torch.autograd.grad(f(self(prompt, boundary, leaf)[0]).sum(), leaf)
            total += weight * (gradient * step).sum(-1)
        return total

    def pattern_gradients(self, prompt: Tensor, f: Function) -> tuple[list[Tensor], list[Tensor]]:
        """Patterns, and the gradients there, both [head, dst, src]."""
        logits, patterns = self(prompt)
        gradients = torch.autograd.grad(f(logits).sum(), patterns)
        return [one[0].detach() for one in patterns], [one[0] for one in gradients]

    def mean_pattern_gradient(
        self, prompt: Tensor, start: list[Tensor], f: Function, layer: int, n: int = 64
    ) -> Tensor:
        """Gradient at a block's pattern, averaged along its path, [head, dst, src]."""
        end = self.resid(prompt)[layer]
        total: Any = 0.0
        for a, weight in _rule(n):
            leaf = (start[layer] + a * (end - start[layer])).requires_grad_()
            logits, patterns = self(prompt, layer, leaf)
            total = total + weight * torch.autograd.grad(f(logits).sum(), patterns[layer])[0][0]
        return total


def ca_lig(
    token: list[Tensor], edges: list[Tensor], mix: float, scale: str, through: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Relevance followed back with plain loops; edges are [dst, src] of each block.

    Returns:
        what goes from destinations to sources, [src, dst], and what arrives, both by block.
    """
    n, r = len(token[0]), token[-1].clone()
    fused, rolled = [], []
    for layer in reversed(range(len(edges))):
        m = torch.zeros(n, n, dtype=torch.float64)
        for j in range(n):
            for i in range(n):
                m[i, j] = (1.0 if i == j else 0.0) + float(edges[layer][j, i])
            if through == "identity":
                m[:, j] /= 2
            if through == "conserving":
                m[:, j] /= float(m[:, j].sum())
        moved = m * r
        own, there = token[layer], moved.sum(1)
        if scale == "sum":
            moved = moved * float(own.sum() / there.sum())
        if scale == "max":
            moved = moved * float(own.abs().max() / there.abs().max())
        both = mix * moved
        for j in range(n):
            both[:, j] += (1 - mix) * own * float(r[j].abs() / r.abs().sum())
        r = both.sum(1)
        fused.insert(0, both)
        rolled.insert(0, r)
    return fused, rolled


def _rule(n: int) -> list[tuple[float, float]]:
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return [(float(a + 1) / 2, float(w) / 2) for a, w in zip(nodes, weights, strict=True)]
