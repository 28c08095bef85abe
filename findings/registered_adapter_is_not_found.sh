#!/usr/bin/env bash
# transformer_lens 4.3.0, ArchitectureAdapterFactory.register_adapter: boot_transformers never asks for what it registers.
#
# One would guess: an adapter that is registered under the name of a transformers class serves models of that class, as
# the docstring says.
# What happens: boot_transformers looks the names of a config up in the table SUPPORTED_ARCHITECTURES, of which the
# factory holds a copy; register_adapter writes into the copy, so the name is not found and the model is refused.
# Why it matters here: XLM-R, ALBERT, DeBERTa, DINOv2 and many more are served by adapters of this package.
# What is done about it: they are entered in both (`lig_lens/models/served.py`; `tests/test_families.py`).
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
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES, ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge

transformers.utils.logging.disable_progress_bar()
print("transformer_lens", version("transformer_lens"), "transformers", version("transformers"))

sizes = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 48, "max_position_embeddings": 32}
config = transformers.XLMRobertaConfig(vocab_size=40, num_hidden_layers=2, **sizes)
transformers.XLMRobertaForMaskedLM(config).save_pretrained("model")
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
special = {"unk_token": "w0", "pad_token": "w1", "bos_token": "w2", "eos_token": "w3"}
transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained("model")

name, adapter = "XLMRobertaForMaskedLM", SUPPORTED_ARCHITECTURES["RobertaForMaskedLM"]
ArchitectureAdapterFactory.register_adapter(name, adapter)


def boots():
    try:
        TransformerBridge.boot_transformers("model", device="cpu")
    except ValueError as error:
        return str(error).partition(".")[0]
    return "it is loaded"


registered = boots()
SUPPORTED_ARCHITECTURES[name] = adapter
entered = boots()
print("expected: once registered, it is loaded")
print(f"seen: registered: {registered}; entered in the table too: {entered}")
sys.exit(None if registered.startswith("Could not determine") and entered == "it is loaded" else "No longer so.")
EOF
