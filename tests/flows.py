"""Hand-made Flows whose columns add up to their totals."""

import torch

from lig_lens.flow.flow import Flow

TOKENS = ("[CLS]", "the", "cat", "sat", "the", "##s", "[SEP]")

# Tokens that are no markup, and no place in a page.
HOSTILE = (
    "</script><script>window.hacked=1</script>",
    '"><img src=x onerror="window.hacked=1">',
    "a",
    "b' & c",
    "@@header@@",
)


def make_flow(
    tokens=TOKENS,
    layers=(0, 3),
    n_heads=3,
    destinations=None,
    maps=("attn", "mlp", "block"),
    seed=0,
    tol=1e-3,
    settings=None,
):
    generator = torch.Generator().manual_seed(seed)
    destinations = tuple(range(len(tokens))) if destinations is None else destinations
    n_layers, n_pos, n_dst = len(layers), len(tokens), len(destinations)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = {}
    total = {}
    if "attn" in maps:
        tensors["attn"] = random(n_layers, n_heads, n_pos, n_dst)
        total["attn"] = tensors["attn"].sum(2)
    if "mlp" in maps:
        tensors["mlp"] = random(n_layers, n_heads, n_dst)
        tensors["skip"], tensors["bias"] = random(n_layers, n_dst), random(n_layers, n_dst)
        total["mlp"] = tensors["mlp"].sum(1) + tensors["skip"] + tensors["bias"]
    if "block" in maps:
        tensors["block"] = random(n_layers, n_pos, n_dst)
        total["block"] = tensors["block"].sum(1)
    gap = {name: 2e-3 * torch.rand(value.shape, generator=generator) for name, value in total.items()}
    return Flow(
        tokens=tuple(tokens),
        special=tuple(token.startswith("[") for token in tokens),
        layers=tuple(layers),
        destinations=destinations,
        model_name="tiny",
        settings=settings
        or {
            "attn_baseline": "itb",
            "mlp_baseline": "zero",
            "block_baseline": "itb",
            "target": "l2",
            "tol": tol,
        },
        layouts=("post_ln",) * n_layers,
        engines={name: ("hooks",) * n_layers for name in maps},
        **tensors,
        total=total,
        gap=gap,
        converged={name: value <= tol for name, value in gap.items()},
    )
