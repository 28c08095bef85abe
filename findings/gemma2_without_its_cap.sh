#!/usr/bin/env bash
# transformers 5.20.2, the last for Python 3.10: Gemma 2 runs with sdpa by default, which leaves its soft cap out.
#
# One would guess: the default attention computes the model: scores of Gemma 2 are capped by `attn_logit_softcapping`.
# What happens: with sdpa, the default, every cap gives the logits of no cap, without a word; eager attention caps.
# 5.23.0 refuses sdpa for Gemma 2 and takes eager attention.
# Why it matters here: hooks need eager attention, so the bridge caps: what is explained is Gemma 2, and not what the
# same folder gives with transformers alone. With transformers 5.20.2 the tests that compare the two fail for 'gemma2'.
# What is done about it: constraints.txt pins 5.23.0; on Python 3.10 ask transformers for attn_implementation='eager'
# before comparing.
set -euo pipefail
export HF_HUB_OFFLINE=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python} # FINDINGS_PYTHON: one that has the packages
if [ -z "${FINDINGS_PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    "$python" -m pip install --quiet torch==2.13.0 transformers==5.20.2
fi
cd "$folder"

"$python" - <<'EOF'
import sys

import torch
import transformers

print("transformers", transformers.__version__)
ids = torch.tensor([[5, 12, 30, 7, 22]])
sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8}


def logits(cap, **attention):
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**sizes, attn_logit_softcapping=cap, **attention)
    model = transformers.Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
        return model(ids).logits


changes = {}
for name, attention in {"by default": {}, "eager": {"attn_implementation": "eager"}}.items():
    changes[name] = (logits(1.0, **attention) - logits(None, **attention)).abs().max().item()
print("expected: a cap of 1 changes the logits, by default as with eager attention")
for name, change in changes.items():
    print(f"seen: {name}, it changes them by {change:.1e}")
sys.exit(None if changes["by default"] == 0 and changes["eager"] > 0.1 else "No longer so.")
EOF
