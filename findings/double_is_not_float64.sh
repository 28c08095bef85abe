#!/usr/bin/env bash
# transformers 5.23.0: model.double() leaves the norms of Llama, Gemma, Qwen and others in float32.
#
# One would guess: after `.double()` every step of the model is computed in float64.
# What happens: RMSNorm casts its input with `.to(torch.float32)` and back, whatever its dtype, and softmax and rotary
# angles do so too. The output's dtype is float64, its digits are those of float32.
# Why it matters here: a float64 model is the obvious reference for float32 results; this one is good to 1e-7 only, and
# difference quotients of it are noise.
# What is done about it: the tests' oracles run the model under a mode that turns these casts into float64
# (`tests/tiny_models.py`, `exact_hf`).
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
from transformers.models.llama.modeling_llama import LlamaRMSNorm

print("transformers", transformers.__version__)
torch.manual_seed(0)
norm = LlamaRMSNorm(64, eps=1e-6).double()
x = torch.randn(1, 5, 64, dtype=torch.float64)
found = norm(x)
expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
error = ((found - expected).abs().max() / expected.abs().max()).item()
print("expected: float64, relative error about 1e-16")
print(f"seen: {found.dtype}, relative error {error:.1e}")
sys.exit(None if found.dtype == torch.float64 and error > 1e-10 else "No longer so.")
EOF
