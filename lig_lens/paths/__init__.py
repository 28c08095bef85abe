"""Baselines: where a path of integration starts, and how a column is refilled. Loads no torch.

A baseline is a file here, and a line below. One of your own is registered with `register_baseline`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lig_lens.errors import InputError, check_choice
from lig_lens.names import MAPS
from lig_lens.registry import Entry, Registry

if TYPE_CHECKING:
    from lig_lens.paths.baseline import Baseline


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


def register_baseline(
    name: str,
    baseline: "Baseline | type[Baseline]",
    *,
    maps: Sequence[str],
    shared: bool = False,
    second_prompt: bool = False,
    pattern: bool = False,
) -> None:
    """Make a baseline of your own known under a name, in `attribute`, in flags and in config files.

    Args:
        name: under which Flows record it.
        baseline: an object, or its class.
        maps: that it is for, any of `attn`, `mlp` and `block`.
        shared: all destinations have one path, so that it can go with a metric.
        second_prompt: it needs a corrupted prompt.
        pattern: it needs the attention pattern.

    Raises:
        InputError: a name that is taken or cannot be one, an unknown map, or something else than a `Baseline`.
    """
    from lig_lens.paths.baseline import Baseline  # it loads torch, as whoever has a baseline to register did already

    kind = baseline if isinstance(baseline, type) else type(baseline)
    if not issubclass(kind, Baseline):
        raise InputError(f"register_baseline: {kind.__name__} is no Baseline: make it a subclass of lig_lens.Baseline.")
    if isinstance(maps, str) or not maps:
        raise InputError(f"register_baseline: maps={maps!r}: give a list of maps, such as ['attn', 'block'].")
    chosen = tuple(check_choice("map", one, MAPS) for one in maps)
    BASELINES.add(name, BaselineEntry(baseline, chosen, shared, second_prompt, pattern))
