#!/usr/bin/env bash
# transformer_lens 4.3.0, TransformerBridge of BERT: hook_embed does not show the embeddings of tokens.
#
# One would guess: hook_embed shows what the table of tokens gives, before positions are added, as it does on bridges of
# decoders, on HookedTransformer and on HookedEncoder; beside it is hook_pos_embed.
# What happens: on an encoder's bridge it is another name of embed_ln.hook_out, behind the sum of tokens, positions and
# segments and its LayerNorm. embed.hook_out shows the tokens' own.
# Why it matters here: a token's embedding that is replaced at hook_embed takes the position's with it, and logits are
# another model's without any error.
# What is done about it: `lig_lens/relevance/faithfulness/replacers.py` reads embed.hook_out first, and checks that one
# token has one embedding at two positions (`tests/test_faithfulness.py`).
set -euo pipefail
export HF_HUB_OFFLINE=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python} # FINDINGS_PYTHON: one that has the packages
if [ -z "${FINDINGS_PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    "$python" -m pip install --quiet transformer_lens==4.3.0
fi
cd "$folder"

"$python" - 2>/dev/null <<'EOF'
import sys
from importlib.metadata import version

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge

print("transformer_lens", version("transformer_lens"))
sizes = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
torch.manual_seed(0)
plain = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, max_position_embeddings=16)).eval()
plain.save_pretrained("saved")
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained("saved")
bridge = TransformerBridge.boot_transformers("saved", device="cpu")

ids, seen = torch.tensor([[2, 5, 5, 3]]), {}
for name in ("hook_embed", "embed.hook_out"):
    bridge.hook_dict[name].register_forward_hook(lambda _m, _a, output, name=name: seen.__setitem__(name, output[0]))
with torch.no_grad():
    bridge(ids)
table = plain.bert.embeddings.word_embeddings.weight[ids[0]].detach()
off = {name: float((one - table).abs().max()) for name, one in seen.items()}
same = bridge.hook_dict["hook_embed"] is bridge.hook_dict["embed_ln.hook_out"]
print("expected: hook_embed shows rows of the table of tokens, off by 0")
print(f"seen: hook_embed is off by {off['hook_embed']:.3g}, embed.hook_out by {off['embed.hook_out']:.3g}; "
      f"hook_embed {'is' if same else 'is not'} embed_ln.hook_out")
sys.exit(None if off["hook_embed"] > 0.1 and same and off["embed.hook_out"] < 1e-6 else "No longer so.")
EOF
