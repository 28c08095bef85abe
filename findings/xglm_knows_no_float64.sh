#!/usr/bin/env bash
# transformers 5.23.0: XGLM cannot run in float64.
#
# One would guess: `.double()` makes a model slower, and that is all.
# What happens: its attention clips scores at the smallest number of their dtype, which it makes by
# `torch.full((), torch.finfo(scores.dtype).min)`, in PyTorch's default dtype. float32 has no such number: it raises.
# Why it matters here: contributions of this family could be had, and checked, in single precision alone.
# What is done about it: an adapter makes that number in float64 (`lig_lens/models/adapters/xglm.py`); the tests' plain
# model runs under another default dtype.
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

print("transformers", transformers.__version__)
config = transformers.XGLMConfig(vocab_size=40, d_model=32, num_layers=2, attention_heads=4, ffn_dim=48)
model, ids = transformers.XGLMForCausalLM(config).eval().double(), torch.tensor([[5, 9, 7]])
print("expected: logits in float64")
try:
    print("seen:", model(ids).logits.dtype)
    fails = False
except RuntimeError as error:
    fails = True
    print("seen:", error)
torch.set_default_dtype(torch.float64)
print("with float64 as default:", model(ids).logits.dtype)
sys.exit(None if fails else "No longer so.")
EOF
