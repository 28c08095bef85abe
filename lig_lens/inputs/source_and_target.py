"""What a model with an encoder and a decoder takes: a source, and the beginning of the target."""

import numbers
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lig_lens.errors import InputError
from lig_lens.hooked import HookedModel
from lig_lens.inputs.inputs import Inputs
from lig_lens.inputs.token_ids import TokenIds, arbitrary_ids, labelled, read_ids

# Where the tokens that contribute are, and those that are contributed to; and which side a path of each stream passes.
_SIDES = {"encoder": ("source", "source"), "decoder": ("target", "target"), "cross": ("source", "target")}


@dataclass(frozen=True)
class SourceAndTarget(Inputs):
    """Both sides, and the stream that says which of them positions are counted on."""

    source: TokenIds
    target: TokenIds
    stream: str
    kept_as = "token_ids"

    def __len__(self) -> int:
        return len(self._from)

    @property
    def tokens(self) -> tuple[str, ...]:  # type: ignore[override]
        """See the base class."""
        return self._from.tokens

    @property
    def special(self) -> tuple[bool, ...]:  # type: ignore[override]
        """See the base class."""
        return self._from.special

    @property
    def dst_tokens(self) -> tuple[str, ...]:
        """See the base class."""
        return self._to.tokens

    @property
    def dst_special(self) -> tuple[bool, ...]:
        """See the base class."""
        return self._to.special

    @property
    def _from(self) -> TokenIds:
        return self._side(_SIDES[self.stream][0])

    @property
    def _to(self) -> TokenIds:
        return self._side(_SIDES[self.stream][1])

    def _side(self, name: str) -> TokenIds:
        return self.source if name == "source" else self.target

    def arguments(self, batch: int = 1) -> tuple[Tensor, ...]:
        """See the base class."""
        return self.source.arguments(batch)

    def keywords(self, batch: int = 1) -> dict[str, Tensor]:
        """See the base class."""
        return {"decoder_input_ids": self.target.arguments(batch)[0]}

    def shortened(self) -> "SourceAndTarget":
        """See the base class."""
        return SourceAndTarget(self.source.shortened(), self.target.shortened(), self.stream)

    def record(self) -> dict[str, list[int]]:
        """See the base class."""
        return {"source": self.source.record(), "target": self.target.record()}

    def beside(self, other: Any) -> Any:
        """Another source alone goes with this target, where that is not what a path passes."""
        if self.stream == "decoder" or is_source_and_target(other):
            return other
        return (other, self.target)

    def check_held(self, second: Inputs) -> None:
        """See the base class."""
        held = "source" if self.stream == "decoder" else "target"
        if not isinstance(second, SourceAndTarget) or second._side(held).record() != self._side(held).record():
            other = "encoder" if held == "source" else "decoder"
            raise InputError(
                f"corrupted has another {held} than the prompt, and with a metric stream={self.stream!r} holds the "
                f"{held}: the change of the metric that comes from it would be left out. Give the same {held}, or use "
                f"stream={other!r}."
            )


def is_source_and_target(prompt: Any) -> bool:
    """Whether a prompt is a pair `(source, target)`: a tuple of two texts, or sequences of ids."""
    return (
        isinstance(prompt, tuple)
        and len(prompt) == 2
        and not any(isinstance(side, numbers.Integral) for side in prompt)
    )


def arbitrary_source_and_target(model: HookedModel) -> tuple[Tensor, Tensor]:
    """A few ids on each side."""
    ids = arbitrary_ids(model)
    return ids, ids[:, : max(1, ids.shape[1] - 1)]


def read_source_and_target(
    model: HookedModel,
    prompt: Any,
    *,
    stream: str,
    prepend_bos: Any = None,
    attention_mask: Any = None,
    what: str = "prompt",
) -> SourceAndTarget:
    """Read a source, and the beginning of the target.

    Args:
        model: a hooked model with an encoder and a decoder.
        prompt: `(source, target)`, each a text or token ids [pos] or [1, pos]; for `stream="encoder"` a source alone
            will do, whose target is the token that targets start with.
        stream: see `SourceAndTarget`.
        prepend_bos: is refused: sources are read as the tokenizer marks them.
        attention_mask: see `read_ids`; of the source.
        what: name of the argument in messages.

    Padding of the source is dropped. Ids of the target are what the decoder gets, as they stand; a target text gets
    before it the token that targets start with, and what ends it is left off, so that the model is asked how it
    goes on.

    Raises:
        InputError: see `read_ids`; or a prompt that is no pair.
    """
    if is_source_and_target(prompt):
        source, target = prompt
    elif stream == "encoder":
        source, target = prompt, ""
    else:
        raise InputError(
            f"The {what} of a model with an encoder and a decoder is a pair, (source, target), of texts or token ids "
            f"for stream={stream!r}: got {type(prompt).__name__}. The target may be '', or what the decoder has "
            "written so far."
        )
    # TransformerLens takes off what ends a text, and T5's it puts in front: models are trained with it at the end.
    asked = {"prepend_bos": prepend_bos, "attention_mask": attention_mask, "as_tokenized": True}
    read = read_ids(model, source, what=f"{what}'s source", **asked)
    return SourceAndTarget(read, _target(model, target, f"{what}'s target"), stream)


def _target(model: HookedModel, target: Any, what: str) -> TokenIds:
    if isinstance(target, TokenIds):
        return target
    if not isinstance(target, str):
        # A target may start with the token that pads.
        return read_ids(model, target, what=what, may_pad=False)
    start, ids = _start(model, what), list[int]()
    tokenizer = getattr(model, "tokenizer", None)
    if target.strip():
        if tokenizer is None:
            raise InputError(f"The model has no tokenizer: pass the {what} as token ids [pos].")
        ids = list(tokenizer(text_target=target)["input_ids"])
        if ids and ids[-1] == getattr(tokenizer, "eos_token_id", None):
            ids = ids[:-1]
    return labelled(model, torch.tensor([[start, *ids]], device=model.cfg.device), what)


def _start(model: HookedModel, what: str) -> int:
    """The token that targets start with."""
    plain = getattr(model, "original_model", None)
    for config in (getattr(plain, "config", None), getattr(plain, "generation_config", None)):
        start = getattr(config, "decoder_start_token_id", None)
        if start is not None:
            return int(start)
    raise InputError(
        f"The model does not say which token its targets start with (decoder_start_token_id): pass the {what} as token "
        "ids, that token first."
    )
