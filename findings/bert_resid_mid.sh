#!/usr/bin/env bash
# transformer_lens 4.3.0, TransformerBridge of BERT: hook_resid_mid is not the residual between attention and MLP.
#
# One would guess: `hook_resid_mid` is what leaves attention with its skip connection and its LayerNorm, and enters the
# MLP.
# What happens: it is the sum that enters the *second* LayerNorm: the MLP has acted on it already. In a pre-LN model the
# same name is the MLP's input.
# Why it matters here: the `mlp` map goes through that vector; read by name, it would begin behind the MLP that it is
# about.
# What is done about it: a block's nodes are found by running it, never by their names (`blocks/`;
# `tests/test_boundaries.py`).
set -euo pipefail
export HF_HUB_OFFLINE=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python} # FINDINGS_PYTHON: one that has the packages
if [ -z "${FINDINGS_PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    "$python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 transformer_lens==4.3.0
fi
cd "$folder"

"$python" - <<'EOF'
import sys
import warnings
from importlib.metadata import version

import torch
import transformers
from tokenizers import Tokenizer, models
from transformer_lens.model_bridge import TransformerBridge


def bridge(model, folder="model"):
    """A bridge of a random model, by way of a local folder with a tokenizer of 40 words."""
    model.eval().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
    special = {"unk_token": "w0", "pad_token": "w1", "bos_token": "w2", "eos_token": "w3"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return TransformerBridge.boot_transformers(folder, device="cpu").eval()


transformers.utils.logging.disable_progress_bar()
torch.manual_seed(0)
ids = torch.tensor([[5, 12, 30, 7, 22]])
print("transformer_lens", version("transformer_lens"), "transformers", version("transformers"))

sizes = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 48, "max_position_embeddings": 32}
model = bridge(transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=40, num_hidden_layers=2, **sizes)))
layer = model.original_model.bert.encoder.layer[0]
seen = {}
layer.intermediate.register_forward_hook(lambda _, given, __: seen.update(mlp=given[0]))
layer.output.LayerNorm.register_forward_hook(lambda _, given, __: seen.update(norm=given[0]))
with torch.no_grad():
    _, cache = model.run_with_cache(ids)
mid = cache["blocks.0.hook_resid_mid"]
is_mlp, is_norm = (torch.allclose(mid, seen[name], atol=1e-5) for name in ("mlp", "norm"))
print("expected: it enters the MLP")
print(f"seen: it enters the MLP: {is_mlp}; it enters the second LayerNorm: {is_norm}")
sys.exit(None if is_norm and not is_mlp else "No longer so.")
EOF
