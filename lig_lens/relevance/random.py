"""Random scores, standard normal: the floor that a method has to rise above."""

import hashlib
import json
from dataclasses import dataclass

import torch

from lig_lens.relevance.explained import Explained
from lig_lens.relevance.method import Advance, Answer, Method


@dataclass(frozen=True)
class Random(Method):
    """Random scores, the same for the same prompt and seed, whatever the target.

    Attributes:
        seed: another one gives other scores.
    """

    name = "random"
    needs_heads = False

    seed: int = 0

    def explain(self, what: Explained, advance: Advance) -> Answer:
        """See the base class."""
        # The prompt is part of the seed: of one generator, prompts of one length would get the same scores.
        kept = json.dumps([self.seed, what.inputs.record()]).encode()
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(kept).digest()[:7], "big"))
        return Answer(scores=torch.randn(len(what), generator=generator))
