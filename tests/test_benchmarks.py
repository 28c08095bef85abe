"""Every benchmark runs on a tiny setting and records what it promises; no time is asserted."""

import importlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkpoints import SMALL, saved
from tiny_models import save_tiny

from lig_lens.integrate import integrand as engine_common
from lig_lens.integrate import quadrature

pytestmark = pytest.mark.program

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TEXT = "w3 w9 w27 w1 w14 w30 w5 w8 w22 w6"
Program = Callable[[str], ModuleType]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Program:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {kind: tmp_path_factory.mktemp(kind) for kind in ("bert", "llama")}
    for kind, folder in made.items():
        save_tiny(kind, folder)
    return {kind: str(folder) for kind, folder in made.items()}


def read(path: Path) -> dict[str, Any]:
    record = json.loads(path.read_text())
    assert {"environment", "settings", "cells"} <= record.keys()
    assert {"versions", "cpu", "threads", "device"} <= record["environment"].keys()
    return record


def assert_positive(*values: float) -> None:
    assert all(math.isfinite(value) and value > 0 for value in values), values


@pytest.mark.long
def test_cost(program: Program, folders: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "cost.json"
    both = ",".join(folders.values())
    program("cost").main(models=both, lengths="4,6", layers="1", repeats=1, text=TEXT, out=out)
    record = read(out)
    assert len(record["cells"]) == 2 * 6 * 2 and len(record["slopes"]) == 2 * 6
    for cell in record["cells"]:
        assert_positive(cell["ratio"], cell["ratio_hf"], *(cell[s]["ms"] for s in ("attribute", "forward")))
        assert {"converged", "worst_gap", "engines", "resident_peak_mib", "gpu_peak_mib"} <= cell.keys()
        assert cell["worst_gap"] <= 1e-3 and cell["reason"] is None


def test_cost_leaves_out_what_is_beyond_the_budget(program: Program, folders: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "cost.json"
    program("cost").main(
        models=folders["bert"], lengths="4,5,6", rows="mlp:zero", repeats=1, budget=1e-9, text=TEXT, out=out
    )
    first, *rest = read(out)["cells"]
    assert_positive(first["ratio"])
    assert all(cell["ratio"] is None and "budget" in cell["reason"] for cell in rest)


def test_slope_is_the_exponent(program: Program) -> None:
    cost = program("cost")
    cells = [{"tokens": t, "ratio": 1.0, "attribute": {"ms": 0.3 * t**1.5}} for t in (16, 64, 128, 256)]
    assert cost._slope(cells) == pytest.approx(1.5)
    assert cost._expected_seconds(cells, 512) == pytest.approx(0.3e-3 * 512**1.5)


def test_peak_memory_sees_what_is_let_go(program: Program) -> None:
    timing = program("timing")
    cells = 2**24
    result, peaks = timing.peak_memory(lambda: float(torch.ones(cells).sum()), torch.device("cpu"))
    assert result == cells and peaks["gpu_peak_mib"] is None
    if sys.platform == "linux":
        assert 60 <= peaks["resident_peak_mib"] <= 200


def test_sides_take_turns_and_slow_ones_stop(program: Program) -> None:
    timing = program("timing")
    runs: list[str] = []
    first, second = (timing.Side(lambda name=name: runs.append(name)) for name in "ab")
    timing.alternate((first, second), 2, torch.device("cpu"))
    assert runs == ["a", "b", "a", "b"]
    timing.alternate((first, second), 2, torch.device("cpu"), patience=0.0)
    assert len(runs) == 4
    assert_positive(first.median, second.record()["ms"])


def test_memory(program: Program, folders: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    program("memory").main(model=folders["bert"], tokens=6, rows="attn:itb", layers="0", text=TEXT, out=out)
    (cell,) = read(out)["cells"]
    assert cell["reason"] is None
    assert_positive(cell["result_mib"], cell["seconds"])
    assert cell["peak_mib"] is None or cell["peak_mib"] >= 0


def test_accuracy(program: Program, folders: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "accuracy.json"
    program("accuracy").main(
        models=",".join(folders.values()), tokens=6, sample=3, steps="8,64", tols="1e-2,1e-4", text=TEXT, out=out
    )
    assert engine_common.integrate is quadrature.integrate
    cells = read(out)["cells"]
    assert len(cells) == 2 * 6 * (2 * 2 + 2)
    for cell in cells:
        assert_positive(cell["mean_nodes"], cell["worst_error"])
        assert cell["median_gap"] <= cell["worst_gap"] and cell["median_error"] <= cell["worst_error"]
        if cell["rule"] == "ours":
            assert cell["converged"] == 1 and cell["converged_but_error_above_tol"] == 0
            assert cell["worst_gap"] <= cell["tol"] and cell["worst_error"] <= cell["tol"]
        else:
            assert cell["mean_nodes"] == cell["steps"]


def test_fixed_rules_integrate_what_they_should(program: Program) -> None:
    accuracy = program("accuracy")
    width = torch.tensor([1e-9], dtype=torch.float64)
    a, weights = accuracy._reference(width, 100 * width)
    torch.testing.assert_close(weights.sum(), torch.ones((), dtype=torch.float64))
    for distance, layer in ((a, width), (1 - a, 100 * width)):
        slope = layer**2 / (distance**2 + layer**2) ** 1.5  # of distance / sqrt(distance^2 + layer^2)
        torch.testing.assert_close((weights * slope).sum(), torch.ones((), dtype=torch.float64))
    a, weights = accuracy._gauss_legendre(4)
    torch.testing.assert_close((weights * 8 * a**7).sum(), torch.ones((), dtype=torch.float64))
    a, weights = accuracy._trapezoid(5)
    torch.testing.assert_close(weights, torch.tensor([0.125, 0.25, 0.25, 0.25, 0.125], dtype=torch.float64))


def test_versus_captum(program: Program, folders: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("captum", reason='needs pip install -e ".[bench]"')
    out = tmp_path / "captum.json"
    program("versus_captum").main(
        models=",".join(folders.values()), tokens=6, layer=1, sample=2, repeats=1, max_steps=128, text=TEXT, out=out
    )
    cells = read(out)["cells"]
    assert len(cells) == 2 * 4
    for cell in cells:
        assert_positive(*(cell[key] for key in ("captum_over_auto", "captum_over_hooks", "hooks_over_auto")))
        # Where captum adds up, both have integrated the same thing.
        if cell["captum"]["reached_tol"]:
            assert cell["captum"]["worst_gap"] <= 1e-3 and cell["largest_difference"] < 0.01
    assert any(cell["captum"]["reached_tol"] for cell in cells)


def test_classes(program: Program, tmp_path: Path) -> None:
    pytest.importorskip("captum", reason='needs pip install -e ".[bench]"')
    saved("BertForSequenceClassification", tmp_path / "model", **SMALL)
    out = tmp_path / "classes.json"
    program("classes").main(
        model=str(tmp_path / "model"), lengths="8", target=1, repeats=1, max_steps=256, text=TEXT, out=out
    )
    (cell,) = read(out)["cells"]
    assert cell["captum_gap"] <= 1e-3 and cell["ours_gap"] <= 1e-3 and len(cell["steps"]) == 3
    assert_positive(*(cell[key] for key in ("ours_in_passes", "captum_in_passes", "captum_over_ours")))
    # Both add up to the same change.
    assert cell["captum_total"] == pytest.approx(cell["ours_total"], rel=1e-4)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_hf_block_is_the_block(program: Program, folders: dict[str, str], kind: str) -> None:
    import lig_lens

    common, hf_blocks = program("common"), program("hf_blocks")
    model = lig_lens.load_model(folders[kind], device="cpu")
    ids = common.token_ids(model, 6, TEXT)
    block = hf_blocks.HfBlock(common.hf_model(model), ids, 1)
    _, cache = model.run_with_cache(ids[None])
    torch.testing.assert_close(block.resid_pre, cache["blocks.1.hook_resid_pre"][0])
    with torch.no_grad():
        torch.testing.assert_close(block.resid_post(block.resid_pre[None]), cache["blocks.1.hook_resid_post"])
        torch.testing.assert_close(block.heads(block.resid_pre[None]), cache["blocks.1.attn.hook_z"])


def test_prompts_have_the_length_asked_for(program: Program) -> None:
    import lig_lens

    common, released = program("common"), program("versus_released_lig")
    tokenizer = lig_lens.load_model("minilm", device="cpu", load_weights=False).tokenizer
    for length in (8, 19, 64):
        assert length - 2 <= len(tokenizer(released.prose(tokenizer, length))["input_ids"]) <= length
    assert len(set(common.english(3).split(". "))) > 20


def test_versus_intervention(program: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "intervention.json"
    program("versus_intervention").main(model="induction", pairs=2, top=5, tol=1e-2, seed=0, device="cpu", out=out)
    cells = read(out)["cells"]
    assert {cell["effects"] for cell in cells} == {
        "heads",
        "heads, both ways",
        "edges out",
        "edges patched",
        "edges, both ways",
    }
    assert len(cells) == (2 * 5 + 3 * 6) * 2 and all(cell["n"] > 0 for cell in cells)
    assert "Known circuit: heads 0." in capsys.readouterr().out


def test_consistency(program: Program, tmp_path: Path) -> None:
    out = tmp_path / "consistency.json"
    program("consistency").main(model="minilm", sentences=1, tol=1e-2, device="cpu", out=out)
    means = read(out)["cells"]
    assert len(means) == 3 * 8 * 2 and all(-1 <= row["pearson"] <= 1 and row["l2"] > 0 for row in means)


def test_rollout(program: Program, tmp_path: Path) -> None:
    out = tmp_path / "rollout.json"
    program("rollout").main(models="minilm", sentences=1, device="cpu", out=out)
    cells = {(c["attn_baseline"], c["mlp_baseline"], c["rule"]): c for c in read(out)["cells"]}
    assert len(cells) == 3 * 2 * 3
    # What the page on rollouts recommends does better than the defaults.
    assert cells["zero", "zero", "sizes"]["spearman"] > cells["itb", "att_itb_a0", "conserving"]["spearman"] + 0.2
    assert all(c["largest_sum"] == pytest.approx(1.0, abs=1e-4) for (_, _, rule), c in cells.items() if rule == "sizes")


NAMES = (
    "accuracy",
    "consistency",
    "cost",
    "memory",
    "rollout",
    "versus_captum",
    "versus_intervention",
    "versus_released_lig",
)


def test_help_from_another_folder(tmp_path: Path) -> None:
    """One process for all, in which what they share is imported once."""
    started = [sys.executable, "-c", _RUN_EACH, str(BENCHMARKS), *NAMES]
    run = subprocess.run(started, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0 and run.stdout.count("--out") == len(NAMES), run.stderr


# As Python starts a script: its folder first among those that are searched.
_RUN_EACH = """
import runpy, sys
folder, *names = sys.argv[1:]
sys.path[0] = folder
for name in names:
    sys.argv = [f"{name}.py", "--help"]
    try:
        runpy.run_path(f"{folder}/{name}.py", run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, name
"""


@pytest.mark.long
def test_versus_tree(program: Program, tmp_path: Path) -> None:
    out = tmp_path / "versus.json"
    program("versus_tree").main(models="minilm", lengths="4", rows="attn:zero", repeats=1, out=out)
    (cell,) = read(out)["cells"]
    assert_positive(cell["ratio"], *cell["ms"].values())
    assert set(cell["ms"]) == set(cell["peak_mib"]) == {"other", "this"}


def test_engines(program: Program, tmp_path: Path) -> None:
    out = tmp_path / "engines.json"
    program("engines").main(
        families="Qwen3,GptOss", baselines="zero", width=128, tokens=6, destinations="5", repeats=1, out=out
    )
    cells = read(out)["cells"]
    assert [cell["family"] for cell in cells] == ["Qwen3", "GptOss"]
    assert all(cell["apart"] < 1e-4 for cell in cells)
    assert_positive(*(cell["ratio"] for cell in cells))
