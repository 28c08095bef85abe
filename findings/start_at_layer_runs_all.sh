#!/usr/bin/env bash
# transformer_lens 4.3.0, TransformerBridge: start_at_layer=k saves nothing.
#
# One would guess: `model(resid, start_at_layer=3)` runs blocks 3, 4, ... alone, as HookedTransformer's does.
# What happens: the logits are right, but blocks 0 to 2 run as well, and the residual is swapped in afterwards.
# Why it matters here: a path integral runs the rest of the model hundreds of times; from block 20 of 30 that would cost
# three times as much.
# What is done about it: a block's call is recorded once and blocks are called by themselves (`models/stack.py`;
# `tests/test_block.py`, `tests/test_metric.py`).
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

config = transformers.GPT2Config(vocab_size=40, n_layer=4, n_positions=32, n_embd=24, n_head=3)
model = bridge(transformers.GPT2LMHeadModel(config))
with torch.no_grad():
    logits, cache = model.run_with_cache(ids)
    ran = []
    for number, block in enumerate(model.original_model.transformer.h):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    again = model(cache["blocks.3.hook_resid_pre"], start_at_layer=3)
print("expected: block [3] runs")
print(f"seen: blocks {ran} run; same logits: {torch.allclose(again, logits, atol=1e-5)}")
sys.exit(None if ran == [0, 1, 2, 3] else "No longer so.")
EOF
