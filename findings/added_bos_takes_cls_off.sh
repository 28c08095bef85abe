#!/usr/bin/env bash
# transformers 5.23.0, AutoTokenizer with add_bos_token=True: a tokenizer that has no BOS loses its [CLS] and [SEP].
#
# One would guess: asking for a BOS changes nothing where a tokenizer has none, or adds one.
# What happens: the saved post-processor, which puts [CLS] before a text and [SEP] behind it, is replaced by one made of
# BOS and EOS, of which there are none: texts come out bare.
# Why it matters here: TransformerLens 4.3 loads every tokenizer so, and an encoder's texts then miss the tokens that it
# was trained with.
# What is done about it: encoders, and models with an encoder and a decoder, read texts with the model's own tokenizer
# (`lig_lens/models/own_tokenizer.py`; `tests/test_encoders.py`).
set -euo pipefail
export HF_HUB_OFFLINE=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python} # FINDINGS_PYTHON: one that has the packages
if [ -z "${FINDINGS_PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    "$python" -m pip install --quiet transformers==5.23.0 tokenizers
fi
cd "$folder"

"$python" - <<'EOF'
import sys
from importlib.metadata import version

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

print("transformers", version("transformers"))
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b"]
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
)
special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained("saved")

usual = transformers.AutoTokenizer.from_pretrained("saved")("a b").input_ids
asked = transformers.AutoTokenizer.from_pretrained("saved", add_bos_token=True)("a b").input_ids
print("expected: [2, 4, 5, 3] both times")
print(f"seen: {usual}; with add_bos_token=True {asked}")
sys.exit(None if usual == [2, 4, 5, 3] and asked == [4, 5] else "No longer so.")
EOF
