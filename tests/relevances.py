"""Relevances with random numbers, for tests of what can be done with one."""

from typing import Any

import torch

from lig_lens.relevance.relevance import Relevance

TOKENS = ("[CLS]", "what", "a", "wonder", "##ful", "film", "[SEP]")
PATCHES = ("[CLS]", *(f"r{row}c{column}" for row in range(2) for column in range(3)))


def make_relevance(tokens: tuple[str, ...] = TOKENS, seed: int = 0, n_layers: int = 2, **more: Any) -> Relevance:
    """All that a Relevance can have; what is `None` in `more` is left out."""
    generator, n, heads = torch.Generator().manual_seed(seed), len(tokens), 3

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    rolled, token = random(n_layers, n), random(n_layers + 1, n)
    parts: dict[str, Any] = {
        "scores": rolled[0],
        "rolled": rolled,
        "token": token,
        "attention": random(n_layers, heads, n, n),
        "fused": random(n_layers, n, n),
        "total": token.sum(1),
        "gap": torch.full((n_layers + 1,), 2e-4),
        "converged": torch.ones(n_layers + 1, dtype=torch.bool),
        "boundaries": tuple(range(n_layers + 1)),
        "tokens": tokens,
        "special": tuple(token[:1] == "[" for token in tokens),
        "layers": tuple(range(n_layers)),
        "method": "ca_lig",
        "target": "class_logit(1) 'positive'",
        "value": 1.25,
        "reference": -0.5,
        "model_name": "tiny",
        "settings": {
            "method": "ca_lig",
            "parameters": {"mix": 0.5, "keep": "signed"},
            "baseline": "mask",
            "tol": 1e-3,
        },
    }
    return Relevance(**{**parts, **more})
