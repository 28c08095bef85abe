#!/usr/bin/env bash
# captum 0.9.0: method='riemann_trapezoid' does not integrate a constant.
#
# One would guess: the trapezoid rule is exact for straight lines, whatever n_steps.
# What happens: inner points weigh 1/n, the two ends half of that: the weights add up to 1 - 1/n, and so does every
# attribution. Left, right and middle sums add up to 1.
# Why it matters here: at the 32 steps of the released LIG package, which asks for this method, a thirty-second of every
# contribution is missing, whatever the model.
# What is done about it: rules are tested by themselves, against constants and polynomials (`tests/test_quadrature.py`);
# benchmarks/accuracy.py compares with trapezoids that add up to 1.
set -euo pipefail
export HF_HUB_OFFLINE=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python} # FINDINGS_PYTHON: one that has the packages
if [ -z "${FINDINGS_PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    "$python" -m pip install --quiet torch==2.13.0 captum==0.9.0
fi
cd "$folder"

"$python" - <<'EOF'
import sys
from importlib.metadata import version

import torch
from captum.attr import IntegratedGradients

print("captum", version("captum"))
sums = {}
for method in ("riemann_trapezoid", "riemann_left", "riemann_right", "riemann_middle", "gausslegendre"):
    for n in (8, 32):
        given = IntegratedGradients(lambda x: x.sum(1)).attribute(torch.ones(1, 1), method=method, n_steps=n)
        sums[method, n] = given.item()
print("expected: the contribution to f(x) = x at 1 is 1 by every method")
for (method, n), found in sums.items():
    print(f"seen: {method}, {n} steps: {found:.5f}")
as_found = all(abs(sums["riemann_trapezoid", n] - (1 - 1 / n)) < 1e-4 for n in (8, 32))
sys.exit(None if as_found and abs(sums["riemann_left", 8] - 1) < 1e-4 else "No longer so.")
EOF
