"""What the documents show runs: README snippets, docstring examples, and the import stays light."""

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_hooked import has_hooked_transformer

import lig_lens

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
MODULES = [m.name for m in pkgutil.walk_packages(lig_lens.__path__, "lig_lens.")]


def test_readme_has_snippets_for_both_generations() -> None:
    assert any("HookedTransformer" in s for s in SNIPPETS) and any("load_model" in s for s in SNIPPETS)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_readme_snippet(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "HookedTransformer" in SNIPPETS[number] and not has_hooked_transformer():
        pytest.skip("TransformerLens 4 has no HookedTransformer; CI also runs this on 3.9")
    monkeypatch.chdir(tmp_path)
    exec(compile(SNIPPETS[number], f"README snippet {number}", "exec"), {})


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.py")), ids=lambda path: path.name)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), {})


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_names_are_documented_and_resolve() -> None:
    for name in lig_lens.__all__:
        value = getattr(lig_lens, name)
        assert name == "__version__" or (value.__doc__ and name in dir(lig_lens))
    with pytest.raises(AttributeError, match="no attribute 'attribut'"):
        lig_lens.attribut  # noqa: B018


@pytest.mark.parametrize("code", ["import lig_lens", "import lig_lens.cli", "import lig_lens.config, lig_lens.errors"])
def test_import_loads_no_torch(code: str) -> None:
    check = f"{code}\nimport sys\nassert 'torch' not in sys.modules and 'transformer_lens' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


def test_a_submodule_imported_first_hides_no_function() -> None:
    code = "import lig_lens.attribution, lig_lens.flow, lig_lens\nassert callable(lig_lens.attribute)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_files_that_documents_name_exist() -> None:
    for text in (README, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        for path in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (ROOT / path).exists(), path
