#!/usr/bin/env bash
# lxt 2.1 with transformers 5: `lxt.efficient`, the way in that its README shows, does not import, for no model at all.
#
# One would guess: a package that asks for `transformers`, with no bound, works with it, or fails for the models whose
# classes have changed; its patches of Llama do not need BERT.
# What happens: importing any part of `lxt.efficient` imports its copy of transformers' BERT, which wants
# `find_pruneable_heads_and_indices`; transformers 5 has no such function. Past that, `monkey_patch` replaces the table of
# attention functions by a plain dictionary, on which transformers 5 calls `get_interface`: Llama does not run. The
# functions that are patched in do work, put in one by one.
# Why it matters here: lxt is the reference of AttnLRP, by its authors.
# What is done about it: AttnLRP is computed without it, by what a model calls rather than by class, and its functions are
# put into a plain model one by one to be compared with (`tests/test_relevance_lrp.py`).
set -euo pipefail
export HF_HUB_OFFLINE=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python} # FINDINGS_PYTHON: one that has the packages
if [ -z "${FINDINGS_PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    "$python" -m pip install --quiet torch==2.13.0 transformers==5.23.0
    "$python" -m pip install --quiet --no-deps lxt==2.1
fi
cd "$folder"

"$python" - <<'EOF'
import importlib
import sys
import types
from importlib.metadata import requires, version

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

print("lxt", version("lxt"), "transformers", version("transformers"))
print("asks for:", [one for one in requires("lxt") or [] if one.startswith("transformers")])
print("expected: from lxt.efficient import monkey_patch imports, and a patched Llama runs")
seen = []
try:
    from lxt.efficient import monkey_patch  # noqa: F401
except ImportError as error:
    print("seen:", str(error).split(" (")[0])
    seen.append("find_pruneable_heads_and_indices" in str(error))

# The same patches with the folder's own start left out.
import lxt

for name in [one for one in sys.modules if one.startswith("lxt.efficient")]:
    del sys.modules[name]
for name, path in (("lxt.efficient", "efficient"), ("lxt.efficient.models", "efficient/models")):
    sys.modules[name] = package = types.ModuleType(name)
    package.__path__ = [f"{lxt.__path__[0]}/{path}"]
for target, patch in importlib.import_module("lxt.efficient.models.llama").attnLRP.items():
    patch(target)
sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
try:
    model(torch.tensor([[1, 2, 3]]))
except AttributeError as error:
    print("seen:", error)
    seen.append("get_interface" in str(error))
sys.exit(None if seen == [True, True] else "No longer so.")
EOF
