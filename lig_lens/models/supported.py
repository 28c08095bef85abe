"""Families of models that are held against the plain transformers model: what each has, and where it was tested.

The tests write the table (`tests/recorded.py`) and hold every row of it against what they find. Loads no torch.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter

TABLE = Path(__file__).with_name("families.json")


@dataclass(frozen=True)
class SupportedFamily:
    """One row.

    Attributes:
        family: class of transformers, and what is particular about it.
        takes: `text`, `images`, or `source and target`.
        layout: of its blocks, as `describe_boundaries` says it.
        maps: that its blocks have.
        engine: that `engine="auto"` takes for `attn` and `block`.
        gap: worst completeness gap on the tiny random model of the test, at tol=1e-5.
        difference: largest difference from naive float64 autograd through the plain transformers model, relative to
            the largest contribution.
        tested: versions of TransformerLens on which the test passes; on others the bridge computes something else or
            cannot run, which is said on loading.
    """

    family: str
    takes: str
    layout: str
    maps: tuple[str, ...]
    engine: str
    gap: float
    difference: float
    tested: tuple[str, ...]


@cache
def _rows() -> tuple[SupportedFamily, ...]:
    return tuple(TypeAdapter(list[SupportedFamily]).validate_json(TABLE.read_bytes()))


def supported() -> list[SupportedFamily]:
    """Families that were tested, by name.

    Others may work as well: `load_model` takes what TransformerLens' bridge takes, compares it with the plain model,
    and `describe_boundaries` finds every block's nodes numerically, whatever the family.
    """
    return list(_rows())
