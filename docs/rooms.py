"""Draws the rooms of the package and what they import: python docs/rooms.py writes docs/img/rooms.svg.

The arcs are read from the code, so the picture is true of it; tests/test_docs.py fails where it has grown old.
"""

import html
from pathlib import Path

import grimp
import tomllib

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "img" / "rooms.svg"
_ROW, _LEFT, _WIDTH, _TOP = 46, 24, 430, 64
# Single files that almost every room imports.
COMMON = ("choose", "files", "registry", "errors", "names")
_INK, _QUIET, _LINE, _BOX = "#1f2328", "#59636e", "#8250df", "#f6f8fa"


def rooms() -> list[str]:
    """Rooms from the first to import to the last that is imported, as the import rules order them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [name.strip(" ()") for layer in layers for name in layer.replace("|", ":").split(":")]


def drawn() -> list[str]:
    """The rooms that get a box of their own; what all use is left to one box at the bottom, without arcs."""
    return [room for room in rooms() if room not in COMMON]


def imports() -> dict[tuple[str, str], int]:
    """Number of imports from one room to another."""
    graph, found = grimp.build_graph("lig_lens", cache_dir=None), dict[tuple[str, str], int]()
    named = set(drawn())

    def room(module: str) -> str | None:
        parts = module.split(".")
        return parts[1] if len(parts) > 1 and parts[1] in named else None

    for module in graph.modules:
        for other in graph.find_modules_directly_imported_by(module):
            pair = room(module), room(other)
            if pair[0] and pair[1] and pair[0] != pair[1]:
                found[pair[0], pair[1]] = found.get((pair[0], pair[1]), 0) + 1
    return found


def _purpose(room: str) -> str:
    """First sentence of a room's docstring."""
    path = ROOT / "lig_lens" / room
    text = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    return text.split('"""')[1].split("\n")[0].split(". ")[0].rstrip(".")


def draw() -> str:
    """The picture, as SVG."""
    names, arcs = drawn(), imports()
    place = {name: _TOP + _ROW * number for number, name in enumerate(names)}
    height = _TOP + _ROW * (len(names) + 1) + 16
    right = _LEFT + _WIDTH
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right + 330} {height}" '
        f'font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="100%" height="100%" fill="white"/><text x="{_LEFT}" y="28" fill="{_INK}" font-size="15" '
        'font-weight="600">Rooms of lig_lens: each imports only rooms below it</text>'
        f'<text x="{_LEFT}" y="47" fill="{_QUIET}">An arc goes from a room to one that it imports; the thicker, the '
        "more often.</text>",
    ]
    for (room, other), count in sorted(
        sorted(arcs.items()), key=lambda item: -abs(place[item[0][0]] - place[item[0][1]])
    ):
        start, end = place[room] + 15, place[other] + 19
        bow = 14 + 300 * (abs(end - start) / (_ROW * len(names))) ** 0.8
        colour = _LINE if end > start else "#d1242f"
        parts.append(
            f'<path d="M {right} {start} C {right + bow} {start}, {right + bow} {end}, {right} {end}" fill="none" '
            f'stroke="{colour}" stroke-opacity="0.45" stroke-width="{min(6, 0.8 + 0.35 * count):.2f}">'
            f"<title>{room} imports {other} ({count})</title></path>"
        )
    boxes = [(name, _purpose(name)) for name in names] + [(", ".join(COMMON), "What every room may use")]
    for number, (name, purpose) in enumerate(boxes):
        top, shown = _TOP + _ROW * number, purpose if len(purpose) <= 72 else purpose[:71].rsplit(" ", 1)[0] + " …"
        parts.append(
            f'<rect x="{_LEFT}" y="{top - 4}" width="{_WIDTH}" height="{_ROW - 8}" rx="6" fill="{_BOX}" '
            f'stroke="#d1d9e0"/><text x="{_LEFT + 12}" y="{top + 12}" fill="{_INK}" font-weight="600">{name}</text>'
            f'<text x="{_LEFT + 12}" y="{top + 27}" fill="{_QUIET}" font-size="11">{html.escape(shown)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
