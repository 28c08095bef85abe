#!/usr/bin/env bash
# transformers 5.23.0, ViTMAE: a fresh masked autoencoder has no positions, so pre-training learns one number.
#
# One would guess: ViTMAEForPreTraining(config) starts with sine and cosine positions that are not trained, in encoder
# and decoder, as its source says ("initialize (and freeze) position embeddings by sin-cos embedding").
# What happens: all of them are 0, and stay so, since they are frozen. The encoder's initialisation returns early, as
# its convolution was initialised first; the decoder's are set and then zeroed. Hidden patches all look alike, so each
# is filled in with the same values, and the loss stops at the variance of the pixels, without an error.
# Why it matters here: the packaged model of digits is pre-trained with it.
# What is done about it: positions are set at random and learned (`training/digits.py`). Saved models have theirs, and
# are loaded rightly.
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
from importlib.metadata import version

import torch
import transformers

print("transformers", version("transformers"))
torch.manual_seed(0)
sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4}
config = transformers.ViTMAEConfig(image_size=12, patch_size=4, **sizes, **decoder)
model = transformers.ViTMAEForPreTraining(config).eval()
positions = {"encoder": model.vit.embeddings.position_embeddings, "decoder": model.decoder.decoder_pos_embed}
largest = {name: float(one.detach().abs().max()) for name, one in positions.items()}
trained = {name: one.requires_grad for name, one in positions.items()}
with torch.no_grad():
    output = model(torch.randn(1, 3, 12, 12))
hidden = output.logits[0, output.mask[0].bool()]
spread = float((hidden - hidden[0]).abs().max())
print("expected: positions up to 1, and hidden patches that are filled in differently")
print(f"seen: largest position {largest}, trained {trained}; hidden patches differ by {spread:.1e}")
as_found = not any(largest.values()) and not any(trained.values()) and spread < 1e-6
sys.exit(None if as_found else "No longer so.")
EOF
