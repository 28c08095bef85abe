"""Names that all rooms share. Loads no torch."""

import re

MAPS = ("attn", "mlp", "block")
# Of models with an encoder and a decoder: whose attention is explained, the usual one first.
ACROSS = "cross"
STREAMS = ("decoder", "encoder", ACROSS)
SPLITS = ("source", "message")
HOLDS = ("skip", "others")
EXPERTS = ("free", "held")
ENGINES = ("auto", "closed_form", "hooks")
DTYPES = ("float64", "float32", "float16", "bfloat16")


def head_name(layer: int, head: int | None) -> str:
    """What a head is called, such as `L9H6`, or its layer where there is none."""
    return f"layer {layer}" if head is None else f"L{layer}H{head}"


def patch_name(row: int, column: int) -> str:
    """What a patch of an image is called: `r3c7`, both counted from 0."""
    return f"r{row}c{column}"


def patch_place(name: str) -> tuple[int, int] | None:
    """Row and column of a patch of that name; None for anything else.

    >>> patch_place("r3c7")
    (3, 7)
    """
    found = re.fullmatch(r"r(\d+)c(\d+)", name)
    return (int(found[1]), int(found[2])) if found else None
