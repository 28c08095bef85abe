"""What the documents show runs and prints what they say; docstring examples too; and the import stays light."""

import contextlib
import doctest
import importlib
import importlib.util
import io
import os
import pkgutil
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_hooked import has_hooked_transformer

import lig_lens

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
MODULES = [m.name for m in pkgutil.walk_packages(lig_lens.__path__, "lig_lens.")]

# A Python block, what it needs beyond the packaged models, and what it prints.
_BLOCK = re.compile(
    r"(?:<!-- needs: (?P<needs>[^>]*?) -->\n)?```python\n(?P<code>.*?)```(?:\n\n```text\n(?P<printed>.*?)```)?",
    re.DOTALL,
)
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
MET = {
    "HookedTransformer": (
        has_hooked_transformer,
        "TransformerLens 4 has no HookedTransformer; CI also runs this on 3.9",
    ),
    "cuda": (torch.cuda.is_available, "needs a GPU"),
    "network": (lambda: os.environ.get("HF_HUB_OFFLINE") != "1", "needs a network (HF_HUB_OFFLINE=0)"),
}


@dataclass(frozen=True)
class Snippet:
    """A Python block of a page."""

    path: Path
    line: int
    code: str
    needs: str | None
    printed: str | None

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT).as_posix()}:{self.line}"

    def run(self, names: dict[str, object]) -> None:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(self.code, str(self), "exec"), names)
        if self.printed is not None:
            assert_same_text(printed.getvalue(), self.printed, str(self))


def snippets(path: Path) -> list[Snippet]:
    text = path.read_text(encoding="utf-8")
    return [
        Snippet(path, text.count("\n", 0, m.start("code")), m["code"], m["needs"], m["printed"])
        for m in _BLOCK.finditer(text)
    ]


def assert_same_text(found: str, shown: str, where: str) -> None:
    """Same words, and numbers within 2 % or a unit of the last place; gaps (such as 1e-4) within a factor of 30."""
    words = [_NUMBER.sub("#", text).split() for text in (found, shown)]
    assert words[0] == words[1], f"{where} prints\n{found}"
    for one, other in zip(_NUMBER.findall(found), _NUMBER.findall(shown), strict=True):
        value, expected = float(one), float(other)
        if "e-" in other:
            assert expected / 30 <= value <= expected * 30, f"{where}: {one} for {other}"
        else:
            place = 10.0 ** -len(other.partition(".")[2]) * (1 + 1e-9)  # 0.36 - 0.35 is more than 0.01 in floats
            assert abs(value - expected) <= max(0.02 * abs(expected), place), f"{where}: {one} for {other}"


SNIPPETS = [s for path in (README, *PAGES) for s in snippets(path)]


def test_readme_has_snippets_for_both_generations() -> None:
    code = [s.code for s in snippets(README)]
    assert any("HookedTransformer" in s for s in code) and any("load_model" in s for s in code)


def test_what_snippets_need_is_known_and_said() -> None:
    for snippet in SNIPPETS:
        assert snippet.needs is None or snippet.needs in MET, snippet
        before = "\n".join(snippet.path.read_text(encoding="utf-8").split("\n")[: snippet.line])[-600:]
        assert snippet.needs is None or "needs" in before.rpartition("<!--")[0], f"{snippet}: say it in the text too"


@pytest.mark.parametrize("snippet", [s for s in SNIPPETS if s.needs is not None], ids=str)
def test_snippet_with_needs(snippet: Snippet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    met, reason = MET[str(snippet.needs)]
    if not met():
        pytest.skip(reason)
    monkeypatch.chdir(tmp_path)
    snippet.run({})


@pytest.mark.program
@pytest.mark.parametrize(
    "path", [p for p in (README, *PAGES) if snippets(p)], ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_snippets_of_a_page(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, with the names of those before, as a reader would run them."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for snippet in snippets(path):
        if snippet.needs is None:
            snippet.run(names)


@pytest.mark.program
@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_names_are_documented_and_resolve() -> None:
    for name in lig_lens.__all__:
        value = getattr(lig_lens, name)
        assert name == "__version__" or (value.__doc__ and name in dir(lig_lens))
    with pytest.raises(AttributeError, match=r"^No lig_lens attribute attribut$"):
        lig_lens.attribut  # noqa: B018


@pytest.mark.parametrize("code", ["import lig_lens", "import lig_lens.cli.main"])
def test_import_loads_no_torch(code: str) -> None:
    check = f"{code}\nimport sys\nassert 'torch' not in sys.modules and 'transformer_lens' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


def test_a_submodule_imported_first_hides_no_function() -> None:
    code = "import lig_lens.attribution, lig_lens.flow.flow, lig_lens\nassert callable(lig_lens.attribute)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_files_that_documents_name_exist() -> None:
    for page in (README, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *PAGES):
        for path in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / path).exists(), f"{page.name}: {path}"


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """What the site's build does beside mkdocs, which need not be installed here."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "page",
    [
        '<script src="https://a.org/x.js"></script>',
        "<img alt=x src='//a.org/x.png'>",
        '<link rel="stylesheet" href="http://a.org/x.css">',
        "body { background: url( 'https://a.org/x.png') }",
        '@import "https://a.org/x.css";',
    ],
)
def test_external_loads_are_found(hooks: ModuleType, page: str) -> None:
    assert len(hooks.external_loads(page)) == 1


def test_links_are_no_loads(hooks: ModuleType) -> None:
    page = '<a href="https://a.org">x</a><script src="x.js"></script><img src="img/x.png"><link href="x.css">'
    assert hooks.external_loads(page) == []


def test_links_out_of_the_docs_lead_into_the_site(hooks: ModuleType) -> None:
    def rewritten(text: str, source: str, place: str) -> str:
        return hooks.with_site_links(text, ROOT / source, place)

    assert (
        rewritten("[b](../benchmarks/README.md#results)", "docs/recipes.md", "recipes.md")
        == "[b](benchmarks.md#results)"
    )
    assert rewritten("[c](../docs/circuits.md)", "benchmarks/README.md", "benchmarks.md") == "[c](circuits.md)"
    assert rewritten("[y](../configs/ioi.yaml)", "docs/recipes.md", "recipes.md") == "[y](files/configs/ioi.yaml)"
    assert rewritten("[m](../method.md)", "docs/api/flow.md", "api/flow.md") == "[m](../method.md)"
    for untouched in ("[x](https://a.org)", "[x](#here)", "`[b](../benchmarks/README.md)`", "[x](nowhere.md)"):
        assert rewritten(untouched, "docs/recipes.md", "recipes.md") == untouched
