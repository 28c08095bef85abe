#!/usr/bin/env bash
# transformer_lens 4.3.0, GLM 4 MoE Lite: of two norms of one kind, one has no hook_scale.
#
# One would guess: latent attention shows what both of its norms divide by, as every other norm does.
# What happens: `kv_a_layernorm` is a norm's component, with hook_scale and hook_normalized; `q_a_layernorm` is a plain
# component, with hook_in and hook_out alone. In DeepSeek's models both are norms' components.
# Why it matters here: the closed form needs the divisor of a latent vector.
# What is done about it: the norm is fitted, from latents and what comes out of it, and its divisor follows
# (`fit_latents` in `lig_lens/blocks/latent.py`; the family in `tests/test_families.py`).
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
from importlib.metadata import version

import transformers
from tokenizers import Tokenizer, models
from transformer_lens.model_bridge import TransformerBridge

print("transformer_lens", version("transformer_lens"), "transformers", version("transformers"))
config = transformers.Glm4MoeLiteConfig(
    vocab_size=40, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
    v_head_dim=8, mlp_layer_types=["dense"], pad_token_id=0,
)  # fmt: skip
transformers.AutoModelForCausalLM.from_config(config).save_pretrained("saved")
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0").save_pretrained("saved")
attention = TransformerBridge.boot_transformers("saved", device="cpu").blocks[0].attn

names = ("q_a_layernorm", "kv_a_layernorm")
seen = {name: hasattr(getattr(attention, name), "hook_scale") for name in names}
print("expected: a hook_scale on both")
print("seen:", {name: f"{type(getattr(attention, name)).__name__}, hook_scale {seen[name]}" for name in names})
sys.exit(None if list(seen.values()) == [False, True] else "No longer so.")
EOF
