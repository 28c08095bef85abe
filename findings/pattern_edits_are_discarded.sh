#!/usr/bin/env bash
# transformer_lens 4.3.0, TransformerBridge: edits of hook_pattern do nothing on BERT, GPT-J and GPT-Neo.
#
# One would guess: a hook on hook_pattern that changes attention changes what the model says, as it does on GPT-2, Llama
# and NeoX.
# What happens: these attentions have used the pattern when the hook is called. A changed tensor that the hook returns
# is dropped with a UserWarning, one changed in place without any.
# Why it matters here: knocking an edge out by its pattern would report that no edge matters.
# What is done about it: `patching.knock_out` takes an edge's message out of what leaves the head instead
# (`interventions/`; `tests/test_patching.py` compares with edits of the pattern where these work, and with edits of
# hook_z).
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

sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 32}
gpt = {"vocab_size": 40, "n_layer": 2, "n_positions": 32, "n_embd": 32, "n_head": 4}
neo = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
heads = {"num_hidden_layers": 2, "num_attention_heads": 4}
made = {
    "gpt2": transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt)),
    "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)),
    "gptj": transformers.GPTJForCausalLM(transformers.GPTJConfig(**gpt, rotary_dim=4)),
    "gpt_neo": transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**sizes, **neo)),
    "bert": transformers.BertForMaskedLM(transformers.BertConfig(**sizes, **heads)),
}


def in_place(pattern, hook):
    pattern.zero_()


found = {}
print("expected: without attention the logits are others")
for name, model in made.items():
    model = bridge(model)
    for way, hook in {"returned": lambda pattern, hook: torch.zeros_like(pattern), "in place": in_place}.items():
        with torch.no_grad(), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            before = model(ids)
            after = model.run_with_hooks(ids, fwd_hooks=[("blocks.0.attn.hook_pattern", hook)])
        changed = not torch.equal(before, after)
        found[name, way] = changed, any("edit is discarded" in str(one.message) for one in told)
        print(f"seen: {name}, {way}: logits change: {changed}, warning: {found[name, way][1]}")
works = all(found[name, "returned"][0] for name in ("gpt2", "llama"))
dropped = all(found[name, way][0] is False for name in ("gptj", "gpt_neo", "bert") for way in ("returned", "in place"))
silent = not any(found[name, "in place"][1] for name in ("gptj", "gpt_neo", "bert"))
sys.exit(None if works and dropped and silent else "No longer so.")
EOF
