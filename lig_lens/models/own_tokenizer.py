"""Texts read as a model's own tokenizer reads them, where TransformerLens changes it."""

from pathlib import Path
from typing import Any

from lig_lens.hooked import has_two_stacks
from lig_lens.models.adapters import T5_ENCODERS

_PROBE = "a"
# Files of which a saved tokenizer has one.
_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "*.bpe.codes")


def placeholder(source: str) -> Any:
    """A tokenizer to load a folder with in which none was saved; None for others.

    transformers makes one up there that knows a few special tokens and reads every text as them.
    """
    folder = Path(source)
    if not folder.is_dir() or any(any(folder.glob(pattern)) for pattern in _FILES):
        return None
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", pad_token="?")


def keep_own_tokenizer(bridge: Any, source: str) -> None:
    """Let encoders read texts as in transformers, between [CLS] and [SEP]; sources of encoder–decoders as well.

    TransformerLens loads every tokenizer with `add_bos_token=True`, for which transformers may take both off, and it
    takes off what ends a text, as [SEP] does where it is the end-of-text token too.

    Args:
        bridge: of any model; those of other families stay as they are.
        source: folder or hub id that it was loaded from.
    """
    from transformers import AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if bridge.tokenizer is None:
        return
    if has_two_stacks(bridge):
        own = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        if own(_PROBE)["input_ids"] != bridge.tokenizer(_PROBE)["input_ids"]:
            bridge._tokenizer = own  # the property would change it again
        return
    cfg = bridge.cfg
    if type(bridge.original_model).__name__ in T5_ENCODERS:  # else what ends a text would be put in front of it
        cfg.default_prepend_bos, cfg.tokenizer_appends_eos = cfg.tokenizer_prepends_bos, False
        return
    of_type = MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(bridge.original_model.config.model_type, "")
    if not of_type.endswith("ForMaskedLM"):
        return
    own = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if own.cls_token_id is None or bridge.to_tokens(_PROBE)[0].tolist() == own(_PROBE)["input_ids"]:
        return
    bridge._tokenizer = own
    cfg.tokenizer_prepends_bos, cfg.tokenizer_appends_eos = True, False
