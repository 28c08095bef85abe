"""Naive oracles of the neighbours of CA-LIG: plain transformers classifiers in float64, no code of the package."""

from typing import Any

import networkx
import torch
from captum.attr import LayerIntegratedGradients
from class_oracle import ClassOracle, Function
from torch import Tensor

# Modules whose output is what enters the first block.
EMBEDDINGS = {
    "BertForSequenceClassification": "bert.embeddings",
    "GPT2ForSequenceClassification": "transformer.drop",
    "LlamaForSequenceClassification": "model.embed_tokens",
    "ViTForImageClassification": "vit.embeddings",
}
# The position that the head reads.
READS = {"Bert": 0, "GPT2": -1, "Llama": -1, "ViT": 0}


def read(oracle: ClassOracle) -> int:
    return next(pos for name, pos in READS.items() if oracle.kind.startswith(name))


def rollout(patterns: list[Tensor]) -> list[Tensor]:
    """Rows [src] of what the output reads are taken by the caller: products [dst, src] from each block to the end."""
    found, product = [], torch.eye(len(patterns[0][0]), dtype=torch.float64)
    for pattern in reversed(patterns):
        product = product @ (0.5 * pattern.mean(0) + 0.5 * torch.eye(len(product), dtype=torch.float64))
        found.insert(0, product)
    return found


def chefer(patterns: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """R [dst, src] before the readout, built from the first block on as in the paper."""
    relevance = torch.eye(len(patterns[0][0]), dtype=torch.float64)
    for pattern, gradient in zip(patterns, gradients, strict=True):
        relevance = relevance + (gradient * pattern).clamp(min=0).mean(0) @ relevance
    return relevance


def gradient_times_input(oracle: ClassOracle, prompt: Tensor, f: Function) -> list[Tensor]:
    """At each boundary, [pos]."""
    found = []
    for boundary, resid in enumerate(oracle.resid(prompt)):
        leaf = resid.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(f(oracle(prompt, boundary, leaf)[0]).sum(), leaf)
        found.append((gradient * resid).sum(-1))
    return found


def attcat(patterns: list[Tensor], cats: list[Tensor]) -> list[Tensor]:
    """What each block adds, [pos]; loops over heads and destinations."""
    found = []
    for pattern, cat in zip(patterns, cats, strict=True):
        n_heads, n_dst, n_src = pattern.shape
        weight = [
            sum(float(pattern[h, j, i]) for h in range(n_heads) for j in range(n_dst)) / (n_heads * n_dst)
            for i in range(n_src)
        ]
        found.append(cat * torch.tensor(weight, dtype=torch.float64))
    return found


def captum_ig(oracle: ClassOracle, prompt: Tensor, other: Tensor, target: int, boundary: int, n_steps: int) -> Tensor:
    """Integrated Gradients of a class by captum, [pos]: of what the embeddings' module gives, or the block before.

    Not of what a block is given: captum 0.9 stops at the `None`s that transformers gives beside it.
    """
    model: Any = oracle.model
    layer = oracle.blocks[boundary - 1] if boundary else model.get_submodule(EMBEDDINGS[oracle.kind])
    explainer = LayerIntegratedGradients(lambda prompts: model(prompts).logits, layer)
    found = explainer.attribute(prompt[None], other[None], target=target, n_steps=n_steps)
    vectors = found[0] if isinstance(found, tuple) else found
    return vectors.detach().reshape(-1, *vectors.shape[-2:])[0].sum(-1)


def largest_flow(patterns: list[Tensor], readout: Tensor, row: int) -> Tensor:
    """The largest flow from the output to each position before block `row`, [pos], in floating point by networkx."""
    graph = networkx.DiGraph()
    for layer in range(row, len(patterns)):
        mean = patterns[layer].mean(0)
        for j in range(len(mean)):
            for i in range(len(mean)):
                capacity = 0.5 * float(mean[j, i]) + (0.5 if i == j else 0.0)
                graph.add_edge((layer + 1, j), (layer, i), capacity=capacity)
    for j, share in enumerate(readout.tolist()):
        graph.add_edge("output", (len(patterns), j), capacity=share)
    return torch.tensor(
        [networkx.maximum_flow_value(graph, "output", (row, i)) for i in range(len(readout))], dtype=torch.float64
    )
