"""Draw the pictures of pictures.md again: python docs/draw.py. Needs what the notebooks need, and chromium.

The page is the source: each of its Python blocks runs, and where a picture follows one, `figure` (or the explorer's
`page`) is drawn into it.
"""

import importlib.util
import re
import shutil
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
_BLOCK = re.compile(r"```python\n(?P<code>.*?)```(?:\n\n!\[[^]]*\]\((?P<picture>img/\w+\.png)\))?", re.DOTALL)


def main() -> None:
    """Run the blocks in order, with the names of those before."""
    spec = importlib.util.spec_from_file_location("build", DOCS.parent / "notebooks" / "build.py")
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    browser = next((path for name in build.BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"None of {', '.join(build.BROWSERS)} is installed.")
    names: dict[str, Any] = {}
    for block in _BLOCK.finditer((DOCS / "pictures.md").read_text("utf-8")):
        exec(compile(block["code"], "pictures.md", "exec"), names)
        if block["picture"]:
            page = names.get("page")
            picture = build.screenshot(page.html, 1200, 900, browser) if page else build.draw(names["figure"], browser)
            (DOCS / block["picture"]).write_bytes(picture)
            print(f"{block['picture']}: {len(picture) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
