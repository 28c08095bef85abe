"""A text or token ids in, what a model of tokens takes out."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lig_lens.errors import InputError
from lig_lens.hooked import HookedModel
from lig_lens.inputs.inputs import Inputs
from lig_lens.inputs.pixels import is_image


@dataclass(frozen=True)
class TokenIds(Inputs):
    """Token ids as the model takes them, without padding, and how to show them."""

    ids: Int[Tensor, "1 pos"]
    tokens: tuple[str, ...]
    special: tuple[bool, ...]
    kept_as = "token_ids"

    def arguments(self, batch: int = 1) -> tuple[Tensor, ...]:
        """See the base class."""
        return (self.ids.expand(batch, -1),)

    def shortened(self) -> "TokenIds":
        """See the base class."""
        return TokenIds(self.ids[:, :2], self.tokens[:2], self.special[:2])

    def record(self) -> list[int]:
        """See the base class."""
        ids: list[int] = self.ids[0].tolist()
        return ids


def read_ids(
    model: HookedModel,
    prompt: Any,
    *,
    prepend_bos: Any = None,
    attention_mask: Any = None,
    what: str = "prompt",
    may_pad: bool = True,
    as_tokenized: bool = False,
) -> TokenIds:
    """Tokenize a text, or check token ids, and drop padding.

    Args:
        model: a hooked model.
        prompt: a text, or token ids [pos] or [1, pos], as tensor or list.
        prepend_bos: for texts, passed on to the model's `to_tokens`; its default is kept with None.
        attention_mask: for ids, 1 for tokens and 0 for padding, which is at the ends, in the shape of the ids. Without
            it, a leading or trailing run of the tokenizer's pad token is padding, if that token has no other meaning.
        what: name of the argument in messages.
        may_pad: False says that pad tokens at the ends of ids are none, where there is no mask.
        as_tokenized: texts are read by the tokenizer alone, as it marks their beginning and end.

    Padding is removed before the model runs, so it neither gives nor receives contributions. Nothing else is
    cut: special tokens stay, marked in `TokenIds.special`.

    Raises:
        InputError: an empty prompt, more tokens than the model's context, ids outside the vocabulary, ids of the wrong
            shape or type, a mask of another convention, or a text that the tokenizer cannot read as it stands.
    """
    if isinstance(prompt, str):
        if attention_mask is not None:
            raise InputError("attention_mask goes with token ids: a text has no padding, leave the mask out.")
        ids = _from_text(model, prompt, prepend_bos, what, as_tokenized)
    else:
        ids = _from_ids(model, prompt, attention_mask, what, may_pad)
    if ids.shape[1] == 0:
        raise InputError(f"The {what} is empty: give at least one token.")
    return labelled(model, ids, what)


def labelled(model: HookedModel, ids: Int[Tensor, "1 pos"], what: str) -> TokenIds:
    """Ids with what they are called.

    Raises:
        InputError: more than the model's context, or a token of the tokenizer that the model does not have.
    """
    if int(ids.max()) >= int(model.cfg.d_vocab):
        added = int(ids.max())
        raise InputError(
            f"The {what} has {model.tokenizer.decode([added])!r}, which the tokenizer reads as token {added} and the "
            f"model, with {model.cfg.d_vocab} tokens, does not have: give the model the tokens that were added to its "
            "tokenizer (resize_token_embeddings), or write it in others."
        )
    n_ctx = int(getattr(model.cfg, "n_ctx", 0) or 0)
    if n_ctx and ids.shape[1] > n_ctx:
        raise InputError(
            f"The {what} has {ids.shape[1]} tokens, more than the model's context of {n_ctx}: "
            "shorten it (nothing is cut silently)."
        )
    return TokenIds(ids, *_labels(getattr(model, "tokenizer", None), ids[0].tolist()))


def arbitrary_ids(model: HookedModel) -> Int[Tensor, "1 pos"]:
    """A few ids that a model takes."""
    length = min(6, int(model.cfg.n_ctx))
    return torch.arange(1, length + 1, device=model.cfg.device)[None] * 7 % int(model.cfg.d_vocab)


def _from_text(model: HookedModel, text: str, prepend_bos: Any, what: str, as_tokenized: bool) -> Tensor:
    if not text.strip():
        raise InputError(f"The {what} is empty: {text!r}. Give a text with at least one word.")
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise InputError(f"The model has no tokenizer: pass the {what} as token ids [pos].")
    if prepend_bos is not None and not isinstance(prepend_bos, bool):
        raise InputError(f"prepend_bos={prepend_bos!r} is neither True nor False: give one, or leave it out.")
    _check_known(tokenizer, text, what)
    if as_tokenized:
        if prepend_bos is not None:
            raise InputError(f"prepend_bos={prepend_bos}: the {what} is read as its tokenizer marks it: leave it out.")
        return torch.tensor([tokenizer(text)["input_ids"]], dtype=torch.long, device=model.cfg.device)
    ids = _tokenized(model, text, prepend_bos)
    bos = getattr(tokenizer, "bos_token", None)
    if prepend_bos is None and bos and text.startswith(bos) and ids[0, :2].tolist() == [tokenizer.bos_token_id] * 2:
        return ids[:, 1:]  # it is written in the text, as chat templates do, and was put before it once more
    cls = getattr(tokenizer, "cls_token_id", None)
    if prepend_bos is False and cls is not None and cls not in ids[0]:
        if cls in _tokenized(model, text, None)[0]:
            raise InputError(
                f"prepend_bos=False would take {tokenizer.cls_token!r} off the {what}, which this "
                "model was trained with: leave prepend_bos out, or pass the token ids that you mean."
            )
    return ids


def _tokenized(model: HookedModel, text: str, prepend_bos: Any) -> Tensor:
    options: dict[str, Any] = {"truncate": False}
    if prepend_bos is not None:
        options["prepend_bos"] = prepend_bos
    try:
        tokens = model.to_tokens(text, **options)
    except TypeError as error:
        if prepend_bos is None:
            raise
        raise InputError(
            f"{type(model).__name__}.to_tokens takes no prepend_bos={prepend_bos}: leave it out."
        ) from error
    # HookedEncoder returns (ids, token type ids, mask); one text alone needs the ids only.
    ids: Tensor = tokens[0] if isinstance(tokens, tuple) else tokens
    return ids


def _check_known(tokenizer: Any, text: str, what: str) -> None:
    """A tokenizer that reads what it does not know as its first token would change the prompt unseen."""
    unknown, bos = (getattr(tokenizer, f"{kind}_token_id", None) for kind in ("unk", "bos"))
    if unknown is None or unknown != bos:
        return
    if tokenizer.encode(text, add_special_tokens=False).count(unknown) > text.count(tokenizer.unk_token):
        words = [word for word in text.split() if tokenizer.encode(word, add_special_tokens=False) == [unknown]]
        raise InputError(
            f"The {what} has words that the tokenizer does not know{': ' if words else ''}"
            f"{', '.join(map(repr, words))}. It would read them as {tokenizer.unk_token!r}: use others."
        )


def _from_ids(model: HookedModel, prompt: Any, attention_mask: Any, what: str, may_pad: bool) -> Tensor:
    if is_image(prompt):
        raise InputError(f"The {what} is an image, and this model takes text: give a text or token ids [pos].")
    try:
        ids = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"The {what} is of type {type(prompt).__name__}: give a text or token ids [pos].") from error
    if ids.numel() == 0:
        raise InputError(f"The {what} is empty: give at least one token.")
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.ndim not in (1, 2):
        raise InputError(
            f"The {what} has dtype {ids.dtype} and shape {list(ids.shape)}: token ids are integers [pos] or [1, pos]."
        )
    if ids.ndim == 2 and ids.shape[0] != 1:
        raise InputError(
            f"The {what} has shape {list(ids.shape)}, a batch of {ids.shape[0]}: "
            "pass a list of prompts to get a list of Flows."
        )
    ids = ids.reshape(-1).long()
    low, high, d_vocab = int(ids.min()), int(ids.max()), int(model.cfg.d_vocab)
    if low < 0 or high >= d_vocab:
        bad = low if low < 0 else high
        raise InputError(
            f"The {what} holds token id {bad}, outside the vocabulary 0 … {d_vocab - 1}: use the model's tokenizer."
        )
    if attention_mask is not None or may_pad:
        ids = ids[_kept(model, ids, attention_mask, what)]
    return ids[None].to(model.cfg.device)


def _kept(model: HookedModel, ids: Tensor, attention_mask: Any, what: str) -> Tensor:
    """Which positions are no padding."""
    if attention_mask is not None:
        return _read_mask(attention_mask, len(ids), what).to(ids.device)
    tokenizer = getattr(model, "tokenizer", None)
    pad = getattr(tokenizer, "pad_token_id", None)
    others = {getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos", "unk", "cls", "sep")}
    if pad is None or pad in others:
        return torch.ones_like(ids, dtype=torch.bool)
    real = (ids != pad).nonzero()[:, 0]
    kept = torch.zeros_like(ids, dtype=torch.bool)
    if len(real):
        kept[real[0] : real[-1] + 1] = True
    return kept


def _read_mask(attention_mask: Any, n_ids: int, what: str) -> Tensor:
    """A mask of token ids as booleans, True for tokens.

    Raises:
        InputError: another convention than 1 for tokens and 0 for padding, or padding that is not at the ends.
    """
    try:
        mask = torch.as_tensor(attention_mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"attention_mask is of type {type(attention_mask).__name__}: give 1 for tokens and 0 for padding, [pos]."
        ) from error
    convention = "attention_mask has 1 (or True) for tokens and 0 (or False) for padding"
    if mask.ndim > 2 or (mask.ndim == 2 and len(mask) != 1):
        raise InputError(
            f"attention_mask has shape {list(mask.shape)}, as if it said which token sees which: the model makes that "
            f"itself. {convention}, in the shape of the ids."
        )
    mask = mask.reshape(-1)
    if len(mask) != n_ids:
        raise InputError(
            f"attention_mask has {len(mask)} entries for {n_ids} token ids of the {what}: give one per token."
        )
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        added = mask.dtype.is_floating_point and bool((mask <= 0).all())
        kind = " is one that is added to scores (0 for tokens, large negative numbers for padding)" if added else ""
        other = mask[(mask != 0) & (mask != 1)][0].item()
        raise InputError(f"attention_mask{kind or f' holds {other}'}: {convention}: convert it.")
    kept = mask.bool()
    places = kept.nonzero()[:, 0]
    if not len(places):
        raise InputError(f"attention_mask keeps no token of the {what}: {convention}.")
    if int(places[-1] - places[0]) + 1 != len(places):
        hole = int((~kept[int(places[0]) :]).nonzero()[0, 0] + places[0])
        raise InputError(
            f"attention_mask hides position {hole}, between tokens that it keeps: taking a token out would move those "
            "behind it. Padding is at the ends; leave the token out of the ids if that is what you mean."
        )
    return kept


def _labels(tokenizer: Any, ids: list[int]) -> tuple[tuple[str, ...], tuple[bool, ...]]:
    if tokenizer is None:
        return tuple(str(i) for i in ids), tuple(False for _ in ids)
    special = set(getattr(tokenizer, "all_special_ids", []))
    return _told_apart(tokenizer, ids, [_decoded(tokenizer, i) for i in ids]), tuple(i in special for i in ids)


_NO_TEXT = "\N{REPLACEMENT CHARACTER}"
_LONGEST = 16  # pieces; a character has four bytes, and an emoji several characters


def _told_apart(tokenizer: Any, ids: list[int], labels: list[str]) -> tuple[str, ...]:
    """Labels in which pieces of one character name it and say which they are, such as 漢[1/3]."""
    at = 0
    while at < len(ids):
        if _NO_TEXT not in labels[at]:
            at += 1
            continue
        ends = range(at + 2, min(len(ids), at + _LONGEST) + 1)
        end = next((end for end in ends if _NO_TEXT not in str(tokenizer.decode(ids[at:end]))), None)
        if end is None:  # bytes that are no character; they have names of their own
            if hasattr(tokenizer, "convert_ids_to_tokens"):
                labels[at] = f"<{tokenizer.convert_ids_to_tokens(ids[at])}>"
            at += 1
            continue
        text = str(tokenizer.decode(ids[at:end]))
        for number in range(at, end):
            # The space before a word stands with its first piece.
            shown = text if number == at else text.lstrip(" ")
            labels[number] = f"{shown}[{number - at + 1}/{end - at}]"
        at = end
    return tuple(labels)


def _decoded(tokenizer: Any, token: int) -> str:
    """A token's text; decoders of SentencePiece drop the space that one in the middle of a text begins with."""
    text = str(tokenizer.decode([token]))
    named = tokenizer.convert_ids_to_tokens(token) if hasattr(tokenizer, "convert_ids_to_tokens") else text
    return f" {text}" if str(named).startswith("▁") and not text.startswith(" ") else text
