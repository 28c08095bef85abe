"""Baselines: where a path of integration starts, and how a column is refilled. Loads no torch.

A baseline is a file here, and a line below. One of your own is registered with `register_baseline`.
"""

from dataclasses import dataclass

from lig_lens.registry import Entry, Registry


@dataclass(frozen=True)
class BaselineEntry(Entry):
    """What is known of a baseline before it is loaded.

    Attributes:
        maps: that it is for.
        shared: all destinations have one path, so that it can go with a metric.
        second_prompt: it needs a corrupted prompt.
        pattern: it needs the attention pattern.
    """

    maps: tuple[str, ...] = ()
    shared: bool = False
    second_prompt: bool = False
    pattern: bool = False


BASELINES: Registry[BaselineEntry] = Registry(
    "baseline",
    zero=BaselineEntry("lig_lens.paths.zero:Zero", maps=("attn", "mlp", "block"), shared=True),
    itb=BaselineEntry("lig_lens.paths.itb:Itb", maps=("attn", "block")),
    itb_zero_ratio=BaselineEntry("lig_lens.paths.ratios:ItbZeroRatio", maps=("attn", "block")),
    itb_map_ratio=BaselineEntry("lig_lens.paths.ratios:ItbMapRatio", maps=("attn",), pattern=True),
    att_itb_a0=BaselineEntry("lig_lens.paths.att_itb_a0:AttItbA0", maps=("mlp",)),
    corrupted=BaselineEntry(
        "lig_lens.paths.corrupted:Corrupted", maps=("attn", "mlp", "block"), shared=True, second_prompt=True
    ),
)


def baselines_of(map_name: str) -> tuple[str, ...]:
    """Names of the baselines of a map."""
    return BASELINES.names(lambda entry: map_name in entry.maps)
