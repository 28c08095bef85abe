"""Which rollout foretells what the replacement of a token does: python benchmarks/rollout.py.

For every token its vector at the entry of the first block is replaced by the mean over the prompt, and the model is
run: how far each vector that leaves the last block moves is what a rollout, source by destination, should foretell.
"""

import statistics
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import RESULTS, environment, names, show, write_results
from consistency import SENTENCES
from scipy.stats import spearmanr
from tqdm.auto import tqdm

import lig_lens

ATTN = ("itb", "itb_map_ratio", "zero")
MLP = ("att_itb_a0", "zero")
FEWEST = 4  # sources of a destination over which a rank correlation says something


def main(
    models: Annotated[str, typer.Option(help="Names for load_model.")] = "minilm,smollm2",
    sentences: Annotated[int, typer.Option(help="How many of the twenty.")] = 6,
    tol: Annotated[float, typer.Option(help="Largest completeness gap, relative.")] = 1e-2,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    out: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "rollout.json",
) -> None:
    """Rank correlation of rollouts with what was measured; how far their columns differ, and the sizes of these."""
    cells: list[dict[str, Any]] = []
    for name in names(models):
        model = lig_lens.load_model(name, device=device)
        found: dict[tuple[str, str, str], list[tuple[float, float, float]]] = {}
        for sentence in tqdm(SENTENCES[:sentences], desc=name):
            moved = _moved(model, sentence)
            for attn in ATTN:
                for mlp in MLP:
                    flow = lig_lens.attribute(
                        model,
                        sentence,
                        maps=("attn", "mlp"),
                        attn_baseline=attn,
                        mlp_baseline=mlp,
                        tol=tol,
                        progress=False,
                    )
                    for rule in lig_lens.flow.compose.RULES:
                        with warnings.catch_warnings():
                            warnings.simplefilter("ignore")
                            rollout = flow.rollout(rule=rule)
                        found.setdefault((attn, mlp, rule), []).append(_compared(rollout, moved))
        for (attn, mlp, rule), values in found.items():
            spearman, differ, sums = (statistics.mean(one) for one in zip(*values, strict=True))
            cells.append(
                {"model": name, "attn_baseline": attn, "mlp_baseline": mlp, "rule": rule}
                | {"spearman": spearman, "columns_differ": differ, "largest_sum": sums}
            )
    show(
        f"Rollouts against the replacement of tokens, {sentences} sentences",
        ["model", "attn", "mlp", "rule", "Spearman", "columns differ", "largest sum of |shares|"],
        [
            [*list(c.values())[:4], f"{c['spearman']:.2f}", f"{c['columns_differ']:.0%}", f"{c['largest_sum']:.1f}"]
            for c in cells
        ],
        "Means over destinations and sentences. columns differ: from their mean, in parts of their length.",
    )
    settings = {"models": models, "sentences": sentences, "tol": tol}
    write_results(out, {"environment": environment(torch.device(device)), "settings": settings, "cells": cells})


@torch.no_grad()
def _moved(model: Any, sentence: str) -> torch.Tensor:
    """How far each vector that leaves the last block moves when a token is replaced, [src, dst]."""
    blocks = lig_lens.describe_boundaries(model)
    first, last = blocks[0].resid_pre, blocks[-1].resid_post
    ids = model.to_tokens(sentence)
    _, cache = model.run_with_cache(ids)
    resid = cache[first][0]
    runs = resid.expand(len(resid), -1, -1).clone()
    runs.diagonal().copy_(resid.mean(0)[:, None].expand(-1, len(resid)))
    left: list[torch.Tensor] = []
    model.run_with_hooks(
        ids.expand(len(runs), -1),
        fwd_hooks=[(first, lambda value, hook: runs), (last, lambda value, hook: left.append(value.detach()))],
    )
    return (left[0] - cache[last]).norm(dim=-1).cpu()


def _compared(rollout: torch.Tensor, moved: torch.Tensor) -> tuple[float, float, float]:
    """Mean rank correlation of columns, how far these differ from their mean, and the largest sum of sizes in one."""
    seen = (moved > 0).sum(0)
    ranks = [
        float(spearmanr(rollout[moved[:, dst] > 0, dst].abs(), moved[moved[:, dst] > 0, dst]).statistic)
        for dst in range(len(moved))
        if seen[dst] >= FEWEST
    ]
    differ = (rollout - rollout.mean(1, keepdim=True)).norm() / rollout.norm()
    return statistics.mean(ranks), float(differ), float(rollout.abs().sum(0).max())


if __name__ == "__main__":
    typer.run(main)
