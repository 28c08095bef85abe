#!/usr/bin/env bash
# transformer_lens 4.3.0, TransformerBridge: a saved classifier comes back as a language model with a random head.
#
# One would guess: a folder whose config says BertForSequenceClassification gives that model, or an error that this is
# not supported.
# What happens: the class is chosen by model_type: it gives BertForMaskedLM (LlamaForCausalLM, ...), whose head is not
# in the file and is drawn at random, another one at every load. Nothing is raised, warned or logged.
# Why it matters here: every number about logits would explain weights that nobody has trained.
# What is done about it: a classifier is loaded as the class that it was saved as, and logits from weights that stand in
# no file are refused by name (`lig_lens/models/boot.py`; `tests/test_families.py`).
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

sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
sizes |= {"num_attention_heads": 4, "max_position_embeddings": 32, "num_labels": 3, "pad_token_id": 1}
print("expected: three logits a prompt, the same at every load, or an error")
as_found = []
for model in (
    transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)),
    transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**sizes)),
):
    with torch.no_grad(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        one, other = bridge(model), bridge(model)
        logits = [loaded(ids) for loaded in (one, other)]
    kind = type(one.original_model).__name__
    same = torch.equal(*logits)
    print(f"seen: {type(model).__name__} comes back as {kind}, logits {list(logits[0].shape)}")
    print(f"      two loads agree: {same}; {len(told)} warnings")
    as_found.append(logits[0].shape[-1] == 40 and not same)
sys.exit(None if all(as_found) else "No longer so.")
EOF
