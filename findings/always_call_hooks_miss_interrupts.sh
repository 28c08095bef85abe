#!/usr/bin/env bash
# torch 2.13.0, register_forward_hook(always_call=True): not called where a KeyboardInterrupt ends the forward.
#
# One would guess: the hook runs whether or not forward raises, as the documentation says, so what it puts back is put
# back after Ctrl-C too.
# What happens: it is called after an Exception, and not after a KeyboardInterrupt, which is none.
# Why it matters here: blocks of half-precision models are raised to float32 by such hooks while they run.
# What is done about it: whoever puts them on puts the weights back as well (`lig_lens/models/precision.py`;
# `tests/test_surroundings.py`).
set -euo pipefail
export HF_HUB_OFFLINE=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python} # FINDINGS_PYTHON: one that has the packages
if [ -z "${FINDINGS_PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    "$python" -m pip install --quiet torch==2.13.0 numpy
fi
cd "$folder"

"$python" - <<'EOF'
import sys

import torch

print("torch", torch.__version__)
called = {}
for error in (RuntimeError, KeyboardInterrupt):

    class Ends(torch.nn.Module):
        def forward(self, x):
            raise error

    module, seen = Ends(), []
    module.register_forward_hook(lambda *_: seen.append(1), always_call=True)
    try:
        module(torch.zeros(1))
    except error:
        called[error.__name__] = bool(seen)
print("expected: called after both")
print(f"seen: {called}")
sys.exit(None if called == {"RuntimeError": True, "KeyboardInterrupt": False} else "No longer so.")
EOF
