"""Names that all rooms share. Loads no torch."""

MAPS = ("attn", "mlp", "block")
SPLITS = ("source", "message")
EXPERTS = ("free", "held")
ENGINES = ("auto", "closed_form", "hooks")
DTYPES = ("float64", "float32", "float16", "bfloat16")


def head_name(layer: int, head: int | None) -> str:
    """What a head is called, such as `L9H6`, or its layer where there is none."""
    return f"layer {layer}" if head is None else f"L{layer}H{head}"
