#!/usr/bin/env bash
# captum 0.9.0 with transformers 5.23.0, LayerIntegratedGradients(block).attribute(attribute_to_layer_input=True).
#
# One would guess: what enters a block of BertForSequenceClassification can be attributed to, as what leaves it can.
# What happens: AttributeError, 'NoneType' object has no attribute 'clone'. captum clones all that a layer is given by
# position, and transformers gives its blocks a None there where there is no mask.
# Why it matters here: captum is the independent check, and the cost to beat, of Integrated Gradients at every boundary.
# What is done about it: what enters a block is what leaves the one before, or the embeddings' module, and captum is
# asked for that (`tests/neighbour_oracle.py`).
set -euo pipefail
export HF_HUB_OFFLINE=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python} # FINDINGS_PYTHON: one that has the packages
if [ -z "${FINDINGS_PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    "$python" -m pip install --quiet captum==0.9.0 transformers==5.23.0 torch
fi

"$python" - <<'EOF'
import sys
from importlib.metadata import version

import torch
import transformers
from captum.attr import LayerIntegratedGradients

print("captum", version("captum"), "transformers", version("transformers"))
torch.manual_seed(0)
config = transformers.BertConfig(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)
model = transformers.BertForSequenceClassification(config).eval()
model.set_attn_implementation("eager")
ids, other = torch.tensor([[2, 7, 9, 3]]), torch.tensor([[2, 4, 4, 3]])


def total(block, inward):
    explainer = LayerIntegratedGradients(lambda ids: model(ids).logits, model.bert.encoder.layer[block])
    found = explainer.attribute(ids, other, target=1, n_steps=50, attribute_to_layer_input=inward)
    return float((found[0] if isinstance(found, tuple) else found).sum())


print("expected: what leaves block 0 and what enters block 1 give the same sum")
left = total(0, False)
try:
    entered = str(total(1, True))
except AttributeError as error:
    entered = f"{type(error).__name__}: {error}"
print(f"seen: {left:.6f} and {entered}")
sys.exit(None if "'NoneType' object has no attribute 'clone'" in entered else "No longer so.")
EOF
