#!/usr/bin/env bash
# transformer_lens 4.3.0, TransformerBridge: retain_grad() on what a hook is given does nothing, at some hooks.
#
# One would guess: a hook that calls `z.retain_grad()` finds `z.grad` after `backward()`, as on a HookedTransformer.
# What happens: hook_z and hook_q are handed a reshaped tensor beside the one that goes on: `grad` stays None, without
# an error. hook_resid_pre and hook_pattern work.
# Why it matters here: gradients at hook_z are half of attribution patching; None there looks like a head that does not
# matter.
# What is done about it: our hooks give back leaves of their own, and gradients are taken with respect to those
# (`interventions/`; `tests/test_circuits.py` compares with autograd).
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

config = transformers.GPT2Config(vocab_size=40, n_layer=2, n_positions=32, n_embd=24, n_head=3)
model = bridge(transformers.GPT2LMHeadModel(config))
found = {}
for name in ("hook_resid_pre", "attn.hook_pattern", "attn.hook_q", "attn.hook_z"):
    kept = []

    def keep(value, hook, kept=kept):
        value.retain_grad()
        kept.append(value)

    with model.hooks(fwd_hooks=[(f"blocks.1.{name}", keep)]):
        model(ids)[0, -1, 3].backward()
    found[name] = kept[0].grad is not None
print("expected: a gradient at each of them")
print("seen: a gradient at", found)
sys.exit(None if found["hook_resid_pre"] and not found["attn.hook_z"] else "No longer so.")
EOF
