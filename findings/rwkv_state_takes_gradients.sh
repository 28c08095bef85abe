#!/usr/bin/env bash
# transformers 5.23.0: gradients cannot go back through RWKV in eval mode, as it comes.
#
# One would guess: model.eval() changes dropout alone, and the gradient of a logit can be asked for as in train mode.
# What happens: in eval mode the model keeps its recurrent state (use_cache), and writes it in place, position by
# position; autograd then misses what it needs on the way back. With use_cache=False the same gradient comes out.
# Why it matters here: a naive oracle of this family fails, or finds gradients of another function in other versions.
# What is done about it: the tests' plain models keep nothing (`tests/test_families.py`, `ready`); TransformerLens' bridge
# turns it off by itself.
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
config = transformers.RwkvConfig(
    vocab_size=40, context_length=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2
)
model = transformers.RwkvForCausalLM(config).eval()
vectors = torch.randn(1, 6, 32, requires_grad=True)


def gradient(**options):
    logits = model(inputs_embeds=vectors, **options).logits
    return torch.autograd.grad(logits[0, -1, 3], vectors)[0]


print("expected: a gradient, with or without a cache")
print("seen without one:", tuple(gradient(use_cache=False).shape))
try:
    gradient()
    fails = False
except RuntimeError as error:
    fails = True
    print("seen by default:", str(error)[:100])
sys.exit(None if fails else "No longer so.")
EOF
