"""Prompts for indirect object identification (Wang et al. 2022, arXiv 2211.00593), of one length in tokens."""

import itertools
import random
from dataclasses import dataclass
from typing import Any

from lig_lens.arguments import checked
from lig_lens.errors import InputError

NAMES = ("Mary", "John", "Tom", "James", "Anna", "Paul", "Sarah", "David", "Emma", "Peter", "Alice", "Robert")
PLACES = ("store", "park", "school", "garden", "station", "office", "house", "market")
OBJECTS = ("drink", "book", "ring", "ball", "letter", "gift", "kiss", "map")


@dataclass(frozen=True)
class IoiPair:
    """`clean` is continued with `answer`; in `corrupted` the other name gives, so that `wrong` is right."""

    clean: str
    corrupted: str
    answer: str
    wrong: str


@checked
def ioi_pairs(count: int, tokenizer: Any = None, seed: int = 0) -> list[IoiPair]:
    """Draw pairs of prompts with names, places and objects from lists, both orders of the names alike.

    Args:
        count: how many, all different.
        tokenizer: words that are not one token of it (with a leading space) are left out.
        seed: of the draw.

    Raises:
        InputError: more pairs than there are, or a tokenizer that knows fewer than two names.
    """

    def known(words: tuple[str, ...]) -> list[str]:
        if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "decode")):
            raise InputError(f"ioi_pairs: tokenizer={tokenizer!r}: give a tokenizer, such as model.tokenizer.")
        if tokenizer is None:
            return list(words)
        return [w for w in words if len(tokenizer(f" {w}", add_special_tokens=False)["input_ids"]) == 1]

    names, places, objects = known(NAMES), known(PLACES), known(OBJECTS)
    every = list(itertools.product(itertools.permutations(names, 2), (False, True), places, objects))
    if not every:
        raise InputError("ioi_pairs: the tokenizer knows too few names, places or objects as single tokens.")
    if not 0 < count <= len(every):
        raise InputError(f"ioi_pairs: {count} pairs asked for, and {len(every)} can be made: give 1 to {len(every)}.")
    pairs = []
    for (giver, taker), turned, place, thing in random.Random(seed).sample(every, count):
        both = f"{giver} and {taker}" if turned else f"{taker} and {giver}"
        start, end = f"When {both} went to the {place},", f"gave a {thing} to"
        pairs.append(IoiPair(f"{start} {giver} {end}", f"{start} {taker} {end}", answer=f" {taker}", wrong=f" {giver}"))
    return pairs
