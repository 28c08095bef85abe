#!/usr/bin/env bash
# transformers 5.23.0, AutoTokenizer: a folder in which no tokenizer was saved gives one that knows no words.
#
# One would guess: an error, as for Llama's folders, or as transformers 4 gave.
# What happens: for GPT-2 and others the class of the model's tokenizer is made with an empty vocabulary. It reads every
# text as its end-of-text token, or as nothing, and says nothing.
# Why it matters here: a text would be explained of which no word was read.
# What is done about it: a model whose folder has no tokenizer has none, and texts are refused (`lig_lens/models/boot.py`;
# `tests/test_families.py`).
set -euo pipefail
export HF_HUB_OFFLINE=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python} # FINDINGS_PYTHON: one that has the packages
if [ -z "${FINDINGS_PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    "$python" -m pip install --quiet transformers==5.23.0
fi
cd "$folder"

"$python" - <<'EOF'
import sys
from importlib.metadata import version

import transformers

print("transformers", version("transformers"))
transformers.GPT2Config(vocab_size=100, n_embd=8, n_layer=1, n_head=1).save_pretrained("model")
tokenizer = transformers.AutoTokenizer.from_pretrained("model")
read = tokenizer.convert_ids_to_tokens(tokenizer("The cat sat").input_ids)
print("expected: an error that names the missing tokenizer")
print(f"seen: a {type(tokenizer).__name__} of {len(tokenizer)} token(s), which reads 'The cat sat' as {read}")
sys.exit(None if len(tokenizer) == 1 and not {"The", "cat", "sat"} & {word.strip("Ġ") for word in read} else "No longer so.")
EOF
