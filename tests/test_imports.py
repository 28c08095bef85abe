"""Imports that the order of the rooms (`lint-imports`, pyproject.toml) would see and a reader would not."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1] / "lig_lens"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Who imports what inside a function, and why. The commands are not held to it: `--help` must load no torch.
LATE: dict[tuple[str, str], str] = {}
# Who imports what for types alone, and why.
FOR_TYPES: dict[tuple[str, str], str] = {}
# Who asks the package itself for more than its version, and why.
THROUGH_THE_DOOR = {
    "flow.flow": "flow.explore() is what a user would call, lig_lens.explore(flow): no room below show knows the page",
    "relevance.relevance": "the same: relevance.explore(), .table(), and how a notebook shows it",
    "cli.main": "the version",
}


class Import(NamedTuple):
    importer: str
    imported: str
    names: tuple[str, ...]
    where: str  # "top", "late" or "types"


def name_of(source: Path) -> str:
    parts = source.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported_by(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Modules of this package, without its name: "" is the package itself."""
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are written out"
        found = [(node.module or "", tuple(alias.name for alias in node.names))]
    else:
        found = [(alias.name, ()) for alias in node.names]
    for module, names in found:
        if module.split(".")[0] != "lig_lens":
            continue
        inside = module.removeprefix("lig_lens").removeprefix(".")
        for name in names:  # `from lig_lens.flow import file` names a module, `from lig_lens.errors import …` none
            here = PACKAGE.joinpath(*inside.split("."), name) if inside else PACKAGE / name
            if here.is_dir() or here.with_suffix(".py").is_file():
                yield f"{inside}.{name}".removeprefix("."), ()
                names = tuple(other for other in names if other != name)
        if names or not isinstance(node, ast.ImportFrom):
            yield inside, names


def imports(source: Path) -> Iterator[Import]:
    def below(node: ast.AST, where: str) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                for module, names in imported_by(child):
                    yield Import(name_of(source), module, names, where)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield from below(child, "late")
            elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                yield from below(child, "types")
            else:
                yield from below(child, where)

    return below(ast.parse(source.read_text()), "top")


def seen(where: str) -> set[tuple[str, str]]:
    found = (one for source in SOURCES for one in imports(source) if one.where == where)
    return {(one.importer, one.imported) for one in found if one.importer.split(".")[0] != "cli"}


def test_imports_inside_functions_are_the_named_ones() -> None:
    assert seen("late") == set(LATE)


def test_imports_for_types_are_the_named_ones() -> None:
    assert seen("types") == set(FOR_TYPES)


def test_the_package_itself_gives_only_its_version() -> None:
    """It hands on every room's names, lazily: an import from it would not say which room it needs."""
    through = [one for source in SOURCES for one in imports(source) if one.imported == ""]
    assert {one.importer for one in through if one.names != ("__version__",)} == set(THROUGH_THE_DOOR)


def test_a_table_names_files_of_its_own_room() -> None:
    """Entries are loaded by name, which no list of imports shows."""
    homes = {
        (name_of(source), node.value)
        for source in SOURCES
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if re.fullmatch(r"lig_lens(\.\w+)+:\w+", node.value)
    }
    assert homes, "the tables' entries are written otherwise: this test sees none"
    assert {table for table, home in homes if not home.startswith(f"lig_lens.{table}.")} == set()


def test_the_picture_of_the_rooms_is_true_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("rooms", PACKAGE.parent / "docs" / "rooms.py")
    assert spec is not None and spec.loader is not None
    rooms = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rooms)
    assert rooms.PICTURE.read_text(encoding="utf-8") == rooms.draw(), "draw it again: python docs/rooms.py"
