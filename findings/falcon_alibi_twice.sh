#!/usr/bin/env bash
# transformers 5.23.0, Falcon with ALiBi: eager attention adds the bias twice, sdpa once.
#
# One would guess: attn_implementation='eager' and 'sdpa' compute the same function, up to rounding.
# What happens: the model adds the bias to the mask, and eager attention adds it to the scores once more. With every
# slope doubled, sdpa gives what eager gives.
# Why it matters here: hooks need the pattern, so TransformerLens loads models with eager attention: the model explained
# is not the one that sdpa, the default, runs.
# What is done about it: an adapter of this package adds it once (`lig_lens/models/adapters/falcon.py`;
# `tests/test_families.py`). A bridge loaded otherwise is explained as it computes (`tests/test_coverage.py`).
set -euo pipefail
export HF_HUB_OFFLINE=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python} # FINDINGS_PYTHON: one that has the packages
if [ -z "${FINDINGS_PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    "$python" -m pip install --quiet torch==2.13.0 transformers==5.23.0
fi
cd "$folder"

"$python" - <<'EOF'
import sys

import torch
import transformers
from transformers.models.falcon import modeling_falcon

print("transformers", transformers.__version__)
ids = torch.tensor([[5, 12, 30, 7, 22]])
sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True}


def logits(attention):
    torch.manual_seed(0)
    model = transformers.FalconForCausalLM(transformers.FalconConfig(**sizes, attn_implementation=attention)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
        return model(ids).logits


eager, sdpa = logits("eager"), logits("sdpa")
once = modeling_falcon.build_alibi_tensor
modeling_falcon.build_alibi_tensor = lambda *given, **named: 2 * once(*given, **named)
twice = logits("sdpa")
apart, doubled = (eager - sdpa).abs().max().item(), (eager - twice).abs().max().item()
print("expected: eager and sdpa agree within 1e-5")
print(f"seen: they differ by {apart:.1e}; eager and sdpa with doubled bias by {doubled:.1e}")
sys.exit(None if apart > 1e-3 and doubled < 1e-4 * apart + 1e-5 else "No longer so.")
EOF
