#!/usr/bin/env bash
# transformers 5.23.0 with bitsandbytes 0.50.2: a model that was saved cannot be dequantized any more.
#
# One would guess: `save_pretrained` leaves a model as it is.
# What happens: it turns `model.config.dtype` into text, and `model.dequantize()`, which hands that on to `Tensor.to`,
# raises "Invalid device string: 'float32'".
# Why it matters here: weights that are codes are refused, and `dequantize` is the way out that the message names.
# What is done about it: the message says `model.dequantize(dtype=torch.float32)`, which works either way.
set -euo pipefail
export HF_HUB_OFFLINE=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python} # FINDINGS_PYTHON: one that has the packages
if [ -z "${FINDINGS_PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    "$python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 bitsandbytes==0.50.2 accelerate==1.15.0
fi
cd "$folder"

"$python" - <<'EOF'
import sys

import torch
import transformers

print("transformers", transformers.__version__)
config = transformers.LlamaConfig(
    vocab_size=40, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
)
transformers.LlamaForCausalLM(config).save_pretrained("plain")


def quantized() -> transformers.PreTrainedModel:
    asked = transformers.BitsAndBytesConfig(load_in_4bit=True)
    return transformers.AutoModelForCausalLM.from_pretrained("plain", quantization_config=asked, device_map="cpu")


quantized().dequantize()
model = quantized()
model.save_pretrained("saved")
print("expected: the model can be dequantized before and after it was saved")
try:
    model.dequantize()
    seen = ""
except RuntimeError as error:
    seen = str(error)
print(f"seen: {seen or 'no error'}")
model = quantized()
model.save_pretrained("saved")
model.dequantize(dtype=torch.float32)
sys.exit(None if "Invalid device string" in seen else "No longer so.")
EOF
