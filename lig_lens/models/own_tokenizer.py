"""Texts read as a model's own tokenizer reads them, where TransformerLens changes it."""

from typing import Any

_PROBE = "a"


def keep_own_tokenizer(bridge: Any, source: str) -> None:
    """Let an encoder read texts as it does in transformers, between its [CLS] and its [SEP].

    TransformerLens loads every tokenizer with `add_bos_token=True`, for which transformers may take both off, and it
    takes off what ends a text, as [SEP] does where it is the end-of-text token too.

    Args:
        bridge: of any model; those of other families stay as they are.
        source: folder or hub id that it was loaded from.
    """
    from transformers import AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    of_type = MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(bridge.original_model.config.model_type, "")
    if bridge.tokenizer is None or not of_type.endswith("ForMaskedLM"):
        return
    own = AutoTokenizer.from_pretrained(source)
    if own.cls_token_id is None or bridge.to_tokens(_PROBE)[0].tolist() == own(_PROBE)["input_ids"]:
        return
    bridge._tokenizer = own  # the property would change it again
    bridge.cfg.tokenizer_prepends_bos, bridge.cfg.tokenizer_appends_eos = True, False
