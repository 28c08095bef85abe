"""Draw the pictures of the documents again: python docs/draw.py. Needs what the notebooks need, and chromium.

Of pictures.md the page is the source: each of its Python blocks runs, and where a picture follows one, `figure` (or the
explorer's `page`) is drawn into it. The README's picture is made below.
"""

import importlib.util
import os
import re
import shutil
import sys
import tempfile
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
    os.chdir(tempfile.mkdtemp())  # what the blocks save is not to stay
    for block in _BLOCK.finditer((DOCS / "pictures.md").read_text("utf-8")):
        exec(compile(block["code"], "pictures.md", "exec"), names)
        if block["picture"]:
            page = names.get("page")
            if page:
                picture = build.screenshot(page.html, 1300, 900, browser, "#node=6,5&layer=5")
            else:
                picture = build.draw(names["figure"], browser)
            (DOCS / block["picture"]).write_bytes(picture)
            print(f"{block['picture']}: {len(picture) / 1e3:.0f} kB")
    readme = DOCS / "img" / "explorer_ioi.png"
    readme.write_bytes(build.screenshot(explorer_ioi().html, 1500, 960, browser, "#node=23,2&layer=23&orient=right"))
    print(f"{readme.name}: {readme.stat().st_size / 1e3:.0f} kB")


def explorer_ioi() -> Any:
    """The explorer of what speaks for the indirect object, against another name in its place."""
    import lig_lens as ll

    clean = "When Mary and John went to the store, John gave a drink to"
    metric = ll.logit_difference(" Mary", " Sarah")
    flow = ll.attribute(
        ll.load_model("smollm2"), clean, corrupted=clean.replace("Mary", "Sarah"), target=metric, progress=False
    )
    return ll.explore({"' Mary' against ' Sarah'": flow})


if __name__ == "__main__":
    main()
