"""Tiny random checkpoints of classes of transformers, saved as their users have them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import VOCAB, tiny_tokenizer

IDS, OTHER = [5, 12, 30, 7, 22, 9], [5, 12, 11, 7, 22, 9]
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
GQA = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def saved(kind: str, folder: Path, seed: int = 0, **config: Any) -> Any:
    """Save a random model of a class of transformers, with weights large enough to matter; gives the plain model."""
    model_class = getattr(transformers, kind)
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**config)).eval()
    for weight in model.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    model.save_pretrained(folder)
    encodes = {"hidden_size", "dim"} & config.keys() and "num_key_value_heads" not in config
    tiny_tokenizer("bert" if encodes else "gpt2").save_pretrained(folder)
    return model
