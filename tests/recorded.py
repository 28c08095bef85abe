"""What the tests of families find, written into the table of `lig_lens.supported()`, and held against it.

To write the table anew, run those tests on both generations of TransformerLens with `LIG_LENS_FAMILIES=FILE`, then

    python tests/recorded.py FILE...
"""

import dataclasses
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lig_lens as ll
from lig_lens.models.supported import TABLE, SupportedFamily

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
_INTRODUCTION = """# Families of models

Every row was held against naive float64 autograd through the plain transformers model, on a tiny random model with
`tol=1e-5`; `ll.supported()` gives the same table in Python, and `lig-lens models` prints it. The tests write it
(`tests/recorded.py`) and fail if it is not what they find.

Others may work as well: `ll.load_model` takes what TransformerLens' bridge takes and says where that computes something
else than the plain model, and `ll.describe_boundaries(model)` finds the nodes of every block numerically. A family that
cannot be served is named on loading; a block whose attention has no separable heads has the `block` map alone,
which is then held from `zero` and from `itb`.

`difference` is the largest difference from the oracle, relative to the largest contribution; `engine` is what
`engine="auto"` takes for `attn` and `block`.
"""


def held(name: str, takes: str, flow: ll.Flow, difference: float) -> None:
    """Hold a family's row against what a test found, or write it down."""
    engines = flow.engines.get("attn") or flow.engines["block"]
    row = {
        "family": name,
        "takes": takes,
        "layout": flow.layouts[-1],
        "maps": list(flow.maps),
        "engine": engines[-1],
        "gap": float(f"{max(float(gap.max()) for gap in flow.gap.values()):.0e}"),
        "difference": float(f"{difference:.0e}"),
        "tested": [".".join(version("transformer_lens").split(".")[:2])],
    }
    out = os.environ.get("LIG_LENS_FAMILIES")
    if out:
        with Path(out).open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        return
    known = {one.family: one for one in ll.supported()}
    assert name in known, f"{name} stands in no row: write the table anew (tests/recorded.py)"
    one = known[name]
    assert (one.takes, one.layout, list(one.maps), one.engine) == tuple(
        row[key] for key in ("takes", "layout", "maps", "engine")
    )
    assert row["tested"][0] in one.tested


def page() -> str:
    """The table as the documentation shows it."""
    names = [field.name for field in dataclasses.fields(SupportedFamily)]
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    for one in ll.supported():
        cells = (getattr(one, name) for name in names)
        shown = (", ".join(cell) if isinstance(cell, tuple) else str(cell) for cell in cells)
        lines.append(f"| {' | '.join(shown)} |")
    return _INTRODUCTION + "\n" + "\n".join(lines) + "\n"


def _joined(files: list[str]) -> list[dict[str, Any]]:
    """One row for each family, of all runs; numbers are the worst of them."""
    rows: dict[str, dict[str, Any]] = {}
    for file in files:
        for line in Path(file).read_text().splitlines():
            new = json.loads(line)
            row = rows.setdefault(new["family"], new)
            row["tested"] = sorted({*row["tested"], *new["tested"]})
            for key in ("gap", "difference"):
                row[key] = max(row[key], new[key])
    return sorted(rows.values(), key=lambda row: (row["takes"] != "text", row["takes"], row["family"]))


if __name__ == "__main__":
    TABLE.write_text("[\n" + ",\n".join(json.dumps(row) for row in _joined(sys.argv[1:])) + "\n]\n")
    PAGE.write_text(page())
