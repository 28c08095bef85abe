#!/usr/bin/env bash
# transformers 5.23.0, ViTMAE: with mask_ratio=0 the patches are still shuffled at random, and the loss is NaN.
#
# One would guess: a masked autoencoder that masks nothing sees all patches in their order, gives the same every time, and
# has no loss to speak of, or 0.
# What happens: patches are sorted by random noise before any are dropped, so position 1 holds another patch at every
# call; the loss is a mean over no patches, 0 / 0.
# Why it matters here: contributions of patches would belong to other places of the image at every run.
# What is done about it: the adapter hands over ordered noise (`lig_lens/models/adapters/images.py`;
# `tests/test_images.py`).
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
config = transformers.ViTMAEConfig(image_size=12, patch_size=4, mask_ratio=0.0, **sizes, **decoder)
model = transformers.ViTMAEForPreTraining(config).eval()
image = torch.randn(1, 3, 12, 12)
with torch.no_grad():
    first, second = (model.vit(image).last_hidden_state for _ in range(2))
    ordered = [model.vit(image, noise=torch.arange(9.0)[None]).last_hidden_state for _ in range(2)]
    loss = float(model(image).loss)
alike, in_order = torch.allclose(first, second, atol=1e-5), torch.allclose(*ordered, atol=1e-5)
print("expected: two runs on one image give the same vectors, and a finite loss")
print(f"seen: the same without noise given: {alike}; with ordered noise: {in_order}; loss {loss}")
sys.exit(None if not alike and in_order and loss != loss else "No longer so.")
EOF
