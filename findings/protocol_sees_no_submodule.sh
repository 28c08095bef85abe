#!/usr/bin/env bash
# Python 3.12 and newer: isinstance() with a runtime_checkable Protocol does not see what __getattr__ gives.
#
# One would guess: `isinstance(module, Protocol)` asks `hasattr`, as it does up to Python 3.11.
# What happens: from 3.12 on attributes are looked up statically. Those that a class gives through `__getattr__`, as
# torch.nn.Module gives its parameters and submodules, do not count: the answer turns from True to False with the Python
# version.
# Why it matters here: what a hooked model must offer, `blocks` and the hooks, are submodules: every model would be
# refused on 3.12.
# What is done about it: the protocol of a hooked model looks for its parts by `getattr` (`HookedModel`).
set -euo pipefail
python=${FINDINGS_PYTHON:-python3} # it needs no package

"$python" - <<'EOF'
import sys
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class HasBlocks(Protocol):
    blocks: Any


class Module:
    """Keeps its parts in a dictionary, as torch.nn.Module does."""

    def __init__(self):
        self.__dict__["_modules"] = {"blocks": []}

    def __getattr__(self, name):
        try:
            return self.__dict__["_modules"][name]
        except KeyError:
            raise AttributeError(name) from None


module = Module()
found = hasattr(module, "blocks"), isinstance(module, HasBlocks)
print("Python", sys.version.split()[0])
print("expected: hasattr and isinstance agree")
print(f"seen: hasattr {found[0]}, isinstance {found[1]}")
sys.exit(None if found == (True, sys.version_info < (3, 12)) else "No longer so.")
EOF
