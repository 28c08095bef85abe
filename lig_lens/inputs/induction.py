"""Prompts for the packaged induction model: words at random, of which some pair comes twice.

The model (`load_model("induction")`, made by `training/induction.py`) has two layers. To continue `A B ... A` with B it
needs two heads: one in the first layer that looks at the token before, and so writes A into the place of B; and one in
the second that looks for the place into which its own token was written, and copies the word there.
"""

import random
from dataclasses import dataclass

from lig_lens.arguments import checked
from lig_lens.errors import InputError

BOS = "<bos>"
WORDS = tuple(
    "apple bear bell boat book bread bridge cake card cat chair church city clock cloud coat corn cow crown cup desk "
    "dog door drum duck egg farm fire fish flag flute fox frog garden gate ghost goat gold grape hat hill horse house "
    "ice island jar kite knife lake lamp leaf lemon lion map mill moon mouse nest nut owl paint paper pear pen".split()
)
TOKENS = (BOS, *WORDS)
MAX_TOKENS = 64


@dataclass(frozen=True)
class InductionPair:
    """A prompt `... A B ... C D ... A`, and one in which the first A and C have changed places.

    The clean prompt is continued with B (`answer`), the corrupted one with D (`wrong`). `edges` are those that a
    previous-token head (`"previous"`) and an induction head (`"induction"`) need, as (src, dst).
    """

    clean: str
    corrupted: str
    answer: str
    wrong: str
    edges: dict[str, tuple[tuple[int, int], ...]]


@checked
def induction_pairs(count: int, n_words: int = 16, seed: int = 0) -> list[InductionPair]:
    """Draw pairs of prompts for the induction model.

    Args:
        count: how many.
        n_words: of each prompt, 5 to 63; the tokenizer puts one token before them.
        seed: of the draw.

    Raises:
        InputError: a number of words that does not fit.
    """
    if not 0 <= count <= 10**6:
        raise InputError(f"induction_pairs: count={count}: ask for at most a million.")
    if not 5 <= n_words < MAX_TOKENS:
        raise InputError(f"n_words={n_words}: give 5 to {MAX_TOKENS - 1}, two pairs and the word to be continued.")
    if count < 1:
        raise InputError(f"count={count}: ask for at least one pair.")
    draw = random.Random(seed)
    pairs = []
    for _ in range(count):
        words = draw.sample(WORDS, n_words - 1)
        # Places of A and of C: neither overlaps the other's pair, and neither pair is the last but one.
        while True:
            first, second = sorted(draw.sample(range(n_words - 2), 2))
            if second - first >= 2:
                break
        if draw.random() < 0.5:
            first, second = second, first
        swapped = list(words)
        swapped[first], swapped[second] = words[second], words[first]
        last = words[first]
        # Words stand one place further on, behind the first token.
        a, c, end = first + 1, second + 1, n_words
        pairs.append(
            InductionPair(
                clean=" ".join([*words, last]),
                corrupted=" ".join([*swapped, last]),
                answer=words[first + 1],
                wrong=words[second + 1],
                edges={"previous": ((a, a + 1), (c, c + 1)), "induction": ((a + 1, end), (c + 1, end))},
            )
        )
    return pairs
