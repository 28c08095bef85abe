"""Several threads may use one model, which serves them one after the other, and write files side by side."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_bridge

import lig_lens

PROMPTS = [[5, 12, 30, 7, 22], [8, 31, 12, 25], [6, 17, 9, 9, 30, 2], [14, 3, 3]]
METRIC = lig_lens.logit_difference(3, 4)


def work(model, number: int):
    """One of several things to ask of a model; each gives a tensor."""
    prompt = PROMPTS[number % len(PROMPTS)]
    other = [prompt[0] + 1, *prompt[1:]]
    if number % 3 == 0:
        return lig_lens.attribute(model, prompt, maps="attn", progress=False).attn
    if number % 3 == 1:
        flow = lig_lens.attribute(model, prompt, corrupted=other, target=METRIC, tol=1e-2, progress=False)
        return flow.attn
    return lig_lens.patching.patch(model, prompt, other, METRIC, progress=False).values


def test_texts_in_threads() -> None:
    model, text, other = lig_lens.load_model("induction"), "lamp lake mouse lamp", "lamp lake egg lamp"
    metric = lig_lens.logit_difference("lake", "mouse")

    def patched(bos: bool) -> torch.Tensor:
        return lig_lens.patching.patch(model, text, other, metric, prepend_bos=bos, progress=False).values

    alone = {bos: patched(bos) for bos in (True, False)}
    assert alone[True].shape != alone[False].shape
    with ThreadPoolExecutor(8) as pool:
        for bos, found in zip([True, False] * 12, pool.map(patched, [True, False] * 12), strict=True):
            assert torch.equal(found, alone[bos])


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_eight_threads_on_one_model(kind: str) -> None:
    model, numbers = tiny_bridge(kind), [n for n in range(24) if kind == "gpt2" or n % 3 == 0]
    alone = {n: work(model, n) for n in numbers[:12]}
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: work(model, n), numbers))
    for number, result in zip(numbers, found, strict=True):
        assert torch.equal(result, alone[number % 12])


def test_two_threads_save_to_one_path(tmp_path: Path) -> None:
    flow = lig_lens.attribute(tiny_bridge("gpt2"), PROMPTS[0], maps="attn", progress=False)
    path = tmp_path / "f.safetensors"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: flow.save(path), range(40)))
    assert torch.equal(lig_lens.Flow.load(path).attn, flow.attn)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
