"""Families of models that are held against the plain transformers model: what each has, and where it was tested.

The tests write the table (`tests/recorded.py`) and hold every row of it against what they find. Loads no torch.
"""

import difflib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter

from lig_lens.errors import InputError

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


def supported(name: str = "") -> list[SupportedFamily]:
    """Families that were tested, by name.

    Others may work as well: `load_model` takes what TransformerLens' bridge takes, compares it with the plain model,
    and `describe_boundaries` finds every block's nodes numerically, whatever the family.

    Args:
        name: only those with this in their name: a class of transformers, the `model_type` of a config, or part of
            one; capitals, dashes and underscores do not matter.

    Raises:
        InputError: no family has it; names the nearest ones.

    >>> [one.family for one in supported("xlm-roberta-xl")]
    ['XLMRobertaXLForMaskedLM']
    """
    if not isinstance(name, str):
        raise InputError(f"supported: name={name!r}: give a class of transformers or a model_type, as text.")
    known = bool(_plain(name)) or not name.strip()
    rows = [one for one in _rows() if known and _plain(name) in _plain(one.family)]
    if rows:
        return rows
    near = difflib.get_close_matches(_plain(name), list(_stems()), n=3, cutoff=0.6)
    hint = f" Did you mean {', '.join(repr(_stems()[one]) for one in near)}?" if near else ""
    raise InputError(
        f"No family with {name!r} in its name was tested.{hint} load_model may take it all the same, and then says "
        "whether it computes what the plain model does; without a name, all that were tested are listed."
    )


def _plain(name: str) -> str:
    """A name without what differs between classes, types and hub ids."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


@cache
def _stems() -> dict[str, str]:
    """What families are called before their head, plain and as it is written; whole names, too."""
    classes = [one.family.split(",")[0].split(" ")[0] for one in _rows()]
    stems = [re.split(r"(?<=[a-z0-9A-Z])(?:For[A-Z]|LMHead|Model$|EncoderModel$|MTModel$)", one)[0] for one in classes]
    return {_plain(one): one for one in (*classes, *stems)}
