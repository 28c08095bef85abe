"""What `mkdocs build` does beside its plugins: pages and files from outside this folder, and a check of the result.

Notebooks become pages: their text, their code, and what they printed and drew when they were last run.

Links between documents are written as GitHub reads them, relative to the file. Some lead out of `docs/`: to the pages
in `PAGES`, which become part of the site, and to other files of the repository, which are copied into it.
"""

import base64
import json
import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# Documents that live elsewhere, and their place in the site.
PAGES = {
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "README.md": "index.md",  # the site has a front page of its own
}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
# What a browser fetches by itself; an <a href> it does not.
_FETCHED = (
    re.compile(
        r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\bsrc\s*=\s*[\"']?(?:https?:)?//[^\"'\s>]+", re.I
    ),
    re.compile(r"<link\b(?![^>]*\brel\s*=\s*[\"']?canonical)[^>]*?\bhref\s*=\s*[\"']?(?:https?:)?//[^\"'\s>]+", re.I),
    re.compile(r"url\(\s*[\"']?(?:https?:)?//[^)]+", re.I),
    re.compile(r"@import\s+[\"'](?:https?:)?//[^\"']+", re.I),
)


def place_of(target: Path) -> str | None:
    """Where a file of the repository stands in the site; None for what is not in it."""
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    name = target.relative_to(ROOT).as_posix() if target.is_relative_to(ROOT) else ""
    if name in PAGES:
        return PAGES[name]
    if target in NOTEBOOKS:
        return f"notebooks/{target.stem}.md"
    return f"files/{name}" if target.is_file() else None


def with_site_links(text: str, source: Path, place: str) -> str:
    """Rewrite links that lead from one side of `docs/` to the other.

    Args:
        text: Markdown.
        source: the file that it comes from.
        place: of the page in the site, such as `api/flow.md`.
    """
    code = [match.span() for match in _CODE.finditer(text)]

    def rewrite(match: re.Match[str]) -> str:
        link = match[2]
        if re.match(r"[a-z]+:|#", link) or any(start <= match.start() < end for start, end in code):
            return match[0]
        path, _, anchor = link.partition("#")
        there = place_of((source.parent / path).resolve())
        if there is None:
            return match[0]  # mkdocs says that it leads nowhere
        shown = os.path.relpath(there, Path(place).parent.as_posix())
        return f"{match[1]}{shown}{'#' if anchor else ''}{anchor}{match[3]}"

    return _LINK.sub(rewrite, text)


def linked_files(text: str, source: Path) -> set[Path]:
    """Files outside `docs/` and `PAGES` that a document links to."""
    found = set()
    for match in _LINK.finditer(_CODE.sub("", text)):
        target = (source.parent / match[2].partition("#")[0]).resolve()
        if target.is_file() and (place_of(target) or "").startswith("files/"):
            found.add(target)
    return found


def external_loads(text: str) -> list[str]:
    """What a page or a style sheet makes a browser fetch from another host."""
    return [match[0] for pattern in _FETCHED for match in pattern.finditer(text)]


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for number, cell in enumerate(json.loads(path.read_text("utf-8"))["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        printed = "".join("".join(out["text"]) for out in cell["outputs"] if out["output_type"] == "stream")
        if printed.strip():
            parts.append(f"```text\n{printed.rstrip()}\n```")
        for data in (out["data"] for out in cell["outputs"] if "data" in out):
            if "image/png" in data:  # of a figure or of the explorer
                name = f"{path.stem}_{number}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![what the cell draws]({name})")
            elif "text/html" in data:
                # A table: the site has a style for tables.
                table = re.sub(r"<style.*?</style>", "", "".join(data["text/html"]), flags=re.DOTALL)
                table = re.sub(r"<table[^>]*>", "<table>", table)
                parts.append("\n".join(line for line in table.split("\n") if line.strip()))
    return "\n\n".join(parts) + "\n", pictures


# Called by mkdocs.


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and files from outside."""
    from mkdocs.structure.files import File

    for name, place in PAGES.items():
        if not (DOCS / place).exists():
            files.append(File.generated(config, place, abs_src_path=str(ROOT / name)))
    for path in NOTEBOOKS:
        text, pictures = notebook_page(path)
        place = str(place_of(path))
        files.append(File.generated(config, place, content=with_site_links(text, path, place)))
        for name, picture in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=picture))
    sources = [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path]
    for target in sorted({path for source in sources for path in linked_files(source.read_text("utf-8"), source)}):
        files.append(File.generated(config, str(place_of(target)), abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Make links work in the site."""
    if page.file.abs_src_path is None:
        return markdown
    return with_site_links(markdown, Path(page.file.abs_src_path).resolve(), page.file.src_uri)


def on_post_build(config: Any) -> None:
    """Refuse a site that loads anything from another host."""
    from mkdocs.exceptions import PluginError

    for path in sorted(Path(config["site_dir"]).rglob("*")):
        if path.suffix in (".html", ".css"):
            loads = external_loads(path.read_text("utf-8"))
            if loads:
                raise PluginError(f"{path} loads from another host: {loads[0]}")
