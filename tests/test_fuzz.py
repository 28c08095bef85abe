"""Odd values for the arguments of every public function: a right result, or a typed error that names the value."""

import math
import os
import random
import signal
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lig_lens as ll
from lig_lens import patching, plots

pytestmark = [pytest.mark.program, pytest.mark.filterwarnings("ignore")]

CALLS = int(os.environ.get("LIG_LENS_FUZZ_CALLS", "2000"))
LONGEST = 20.0  # seconds of one call, even on a busy machine
SEED = int(os.environ.get("LIG_LENS_FUZZ_SEED", "0"))
Calls = dict[str, tuple[Callable[..., Any], dict[str, Any]]]
CLEAN, OTHER = "lamp lake mouse lamp", "lamp lake egg lamp"


class Odd:
    """Something that nobody expects."""

    def __repr__(self) -> str:
        return "Odd()"


VALUES: list[Any] = [
    None, True, False, 0, 1, 2, -1, -7, 3, 10**30, 0.0, 0.5, 1.5, -1e-3, 1e-3, 1e300, math.nan, math.inf, 1j,
    "", " ", "x", "64", "attn", "atn", "zero", "itb", "itbs", "corrupted", "l2", "product", "mean", "heads", "edges",
    CLEAN, OTHER, "zebra", "lamp " * 300, b"attn", [], [0], [1, 0], [0, 0], [5], [-9], [1.5], [None], ["attn"],
    ["lamp"], [[0, 50, 49]], [0, 50, 49, 50], (0, 1), (), {}, {"a": 1}, {0}, {1, 2}, range(2), range(0), slice(2),
    Odd(), len, lambda x: x, np.float32(1e-3), np.int64(1), np.bool_(True), np.array([0, 1]), np.array([]),
    np.zeros((2, 2)), np.array(["attn"]), np.array(3), torch.tensor(1), torch.tensor(0.5), torch.tensor([0, 1]),
    torch.zeros(0), torch.zeros(5, 32), torch.arange(160.0).reshape(5, 32).cos(), torch.ones(5, 32) * 1j,
    torch.full((5, 32), math.nan), torch.zeros(5, 32, device="meta"), torch.zeros(5, 32, dtype=torch.float16),
    torch.ones(32), torch.tensor([[0, 50, 49]]), torch.tensor([True, False]), Path("x"), Path("/no/such/place"),
    torch.float64, torch.device("cpu"), Exception("x"), ll.InputError, ll.kl_divergence(), ll.direction(torch.ones(32)),
]  # fmt: skip


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Calls:
    """Every public function with arguments that work, which are replaced by odd ones."""
    model = ll.load_model("induction")
    folder = tmp_path_factory.mktemp("fuzz")
    metric = ll.logit_difference("lake", "mouse")
    few = {"layers": [1], "progress": False}
    flow = ll.attribute(model, CLEAN, progress=False, tol=1e-2)
    by_metric = ll.attribute(model, CLEAN, corrupted=OTHER, target=metric, tol=1e-2, **few)
    heads = patching.patch(model, CLEAN, OTHER, metric, **few)
    edges = patching.knock_out(model, CLEAN, metric, **few)
    common = {"model": model, "metric": metric, "prepend_bos": None, "max_batch_tokens": 512, **few}
    of_plots = {"layers": None, "heads": None, "map": "attn", "share": False, "tokens": None}
    asked = {
        "model": model, "prompt": CLEAN, "maps": "attn", "destinations": [4], "tol": 1e-2, "max_nodes": 64,
        "max_batch_tokens": 512, "engine": "auto", "split": "source", "prepend_bos": None, "attention_mask": None,
        "attn_baseline": "itb", "mlp_baseline": "att_itb_a0", "block_baseline": "itb", "target": "l2",
        "corrupted": None, "out": None, **few,
    }  # fmt: skip
    found: Calls = {
        "attribute": (ll.attribute, asked),
        "attribute to a metric": (
            ll.attribute,
            asked | {"maps": None, "attn_baseline": None, "destinations": None, "target": metric, "corrupted": OTHER},
        ),
        "describe_boundaries": (ll.describe_boundaries, {"model": model, "tokens": None, "config_only": False}),
        "patch": (patching.patch, common | {"clean": CLEAN, "corrupted": OTHER, "at": "hook_z", "noising": False}),
        "knock_out": (patching.knock_out, common | {"prompt": CLEAN, "edges": [(1, 0, 1, 2)], "renormalise": False}),
        "ablate": (patching.ablate, common | {"prompt": CLEAN, "others": [OTHER], "by": "mean"}),
        "top_edges": (patching.top_edges, {"flow": edges, "k": 3}),
        "scores": (
            ll.scores,
            {"model": model, "clean": CLEAN, "corrupted": OTHER, "metric": metric, "on": "edges", "layers": [1],
             "which": ("attention",), "prepend_bos": None},
        ),
        "compare": (ll.compare, {"score": by_metric, "effects": heads, "k": 3, "threshold": None}),
        "compare_table": (ll.compare_table, {"scores": {"LIG": by_metric}, "effects": heads, "k": 3}),
        "precision_recall": (ll.precision_recall, {"score": by_metric, "effects": heads, "threshold": None}),
        "average": (ll.average, {"results": [flow, flow]}),
        "consistency_table": (ll.consistency_table, {"flows": [flow], "rules": ("product",)}),
        "direction": (ll.direction, {"w": torch.ones(32)}),
        "metric": (ll.metric, {"function": len, "name": None}),
        "logit_difference": (ll.logit_difference, {"correct": "lake", "wrong": "mouse", "pos": -1}),
        "log_probability": (ll.log_probability, {"answer": "lake", "pos": -1}),
        "class_logit": (ll.class_logit, {"index": 1, "pos": None}),
        "kl_divergence": (ll.kl_divergence, {"pos": -1}),
        "register_baseline": (
            ll.register_baseline,
            {"name": "zero", "baseline": ll.Baseline, "maps": ["attn"], "shared": False, "second_prompt": False},
        ),
        "induction_pairs": (ll.induction_pairs, {"count": 1, "n_words": 16, "seed": 0}),
        "ioi_pairs": (ll.ioi_pairs, {"count": 1, "tokenizer": None, "seed": 0}),
        "load_model": (
            ll.load_model,
            {"model": "induction", "device": "cpu", "dtype": None, "load_weights": True, "hooked_transformer": False},
        ),
        "Flow.load": (ll.Flow.load, {"path": folder / "none"}),
        "Flow.save": (flow.save, {"path": folder / "f.safetensors"}),
        "Flow.to_json": (flow.to_json, {"path": None}),
        "Flow.columns": (flow.columns, {"map": "attn"}),
        "Flow.shares": (flow.shares, {"map": "attn"}),
        "Flow.to_tl": (flow.to_tl, {"map": "attn"}),
        "Flow.compose": (flow.compose, {"rule": "product"}),
        "Flow.consistency": (flow.consistency, {"direct": None, "rule": "product"}),
        "Flow.rollout": (flow.rollout, {"start": None, "stop": None, "rule": "conserving"}),
        "Flow.paths": (flow.paths, {"dst": 3, "k": 3, "start": None, "stop": None, "rule": "conserving"}),
        "Flow.graph": (flow.graph, {"threshold": 0.01, "start": None, "stop": None, "rule": "conserving"}),
        "Flow.select": (flow.select, {"layers": (1,), "destinations": (2,)}),
        "Flow.top": (flow.top, {"k": 3, "map": "attn", "layer": None}),
        "Flow.worst_gap": (flow.worst_gap, {"map": None}),
        "Flow.to_dataframe": (flow.to_dataframe, {"map": "attn"}),
        "Effects.top": (heads.top, {"k": 3}),
        "Effects.label": (heads.label, {"index": (1, 0, 0)}),
        "Effects.to_json": (heads.to_json, {"path": None}),
        "head_map": (plots.head_map, {"flow": flow, "layer": 1, "head": 0, "share": False, "minus": None}),
        "head_grid": (plots.head_grid, {"flow": flow, "scale": None, "minus": None, **of_plots}),
        "importance": (plots.importance, {"flow": flow, **of_plots}),
        "gap_map": (plots.gap_map, {"flow": flow, "map": None, "layers": None, "heads": None, "tokens": None}),
        "effects_map": (plots.effects_map, {"effects": heads, "layers": None, "heads": None, "tokens": None}),
        "agreement_scatter": (plots.agreement_scatter, {"score": by_metric, "effects": heads, "labels": 3}),
        "rollout_map": (plots.rollout_map, {"flow": flow, "start": None, "stop": None, "rule": "conserving"}),
        "paths_graph": (plots.paths_graph, {"flow": flow, "dst": -1, "k": 3, "start": None, "stop": None}),
        "consistency_plot": (plots.consistency_plot, {"results": flow.consistency(), "measure": "pearson"}),
        "show_token": (plots.show_token, {"token": "x", "longest": 40}),
    }  # fmt: skip
    return found


def wrong(result: Any) -> str | None:
    """What is wrong with a result that was given in spite of odd arguments."""
    for one in result if isinstance(result, list) else [result]:
        if isinstance(one, ll.Flow):
            for name in one.maps:
                terms, total = one.columns(name).double(), one.total[name].double()
                summed = terms.sum(-2) if one.metric is None else terms.flatten(1).sum(1) + one.skip.double().sum(1)
                large = total.abs() > 0.05 * total.abs().max()
                missed = ((summed - total).abs() - one.gap[name] * total.abs() * (1 + 1e-5))[large]
                if not bool((missed <= 1e-7 * total.abs().max()).all()):
                    return f"{name} misses its total by more than its gap"
        if isinstance(one, ll.Effects) and bool(one.values.isinf().any()):
            return "infinite effects"
    return None


def test_odd_arguments(
    calls: dict[str, tuple[Callable[..., Any], dict[str, Any]]], tmp_path: Path, monkeypatch
) -> None:
    def too_long(*_: object) -> None:
        raise RuntimeError(f"runs for more than {LONGEST} s")

    monkeypatch.chdir(tmp_path)
    signal.signal(signal.SIGALRM, too_long)
    rng, outcomes, faults = random.Random(SEED), Counter[str](), []
    names = list(calls)
    for number in range(CALLS):
        name = names[number % len(names)]
        function, asked = calls[name]
        changed = rng.sample(list(asked), min(len(asked), rng.choice([1, 1, 2])))
        given = asked | {key: rng.choice(VALUES) for key in changed}
        shown = f"{name}({', '.join(f'{key}={given[key]!r:.60}' for key in changed)})"
        try:
            signal.setitimer(signal.ITIMER_REAL, LONGEST)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = function(**given)
        except ll.LigLensError as error:
            outcomes[type(error).__name__] += 1
            if len(str(error)) < 15:
                faults.append(f"{shown}: says only {str(error)!r}")
        except Exception as error:
            outcomes["untyped"] += 1
            faults.append(f"{shown}: {type(error).__name__}: {str(error)[:150]}")
        else:
            signal.setitimer(signal.ITIMER_REAL, 0)
            outcomes["result"] += 1
            if (problem := wrong(result)) is not None:
                faults.append(f"{shown}: {problem}")
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(dict(outcomes))
    assert not faults, f"{len(faults)} of {CALLS} calls, {dict(outcomes)}:\n" + "\n".join(sorted(set(faults)))
