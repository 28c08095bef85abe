"""Both engines on one block of real width, family by family: python benchmarks/engines.py.

Weights are random. `hooks` costs one backward pass for each destination and head, so it is timed on a few destinations
and its time for all of them follows in proportion; `closed_form` is timed on all. The two are run in turn.
"""

import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers as tf
import typer
from common import RESULTS, environment, names, numbers, show, write_results
from tokenizers import Tokenizer, models

import lig_lens as ll

VOCAB = 512


def _config(kind: str, width: int, **more: Any) -> Any:
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 128 or 1, "head_dim": 64}
    if "kv_lora_rank" in more:  # what is latent serves all heads
        heads["num_key_value_heads"] = width // 64
    sizes = {"vocab_size": VOCAB, "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 1}
    return getattr(tf, kind)(**{**sizes, **heads, "pad_token_id": 0, **more})


# Whose attention the closed form did not have before: what it has now is in the second column.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Qwen3": ("norms on heads", "Qwen3Config", {}),
    "Gemma3": ("norms on heads", "Gemma3TextConfig", {}),
    "Olmo2": ("norms over heads", "Olmo2Config", {}),
    "Cohere": ("LayerNorm on heads", "CohereConfig", {"use_qk_norm": True}),
    "HunYuan": ("norms after rotary", "HunYuanDenseV1Config", {}),
    "Llama4": ("norms no hook shows", "Llama4TextConfig", {"num_local_experts": 1, "interleave_moe_layer_step": 5}),
    "Gemma2": ("capped scores", "Gemma2Config", {"attn_logit_softcapping": 5.0}),
    "XLMRoberta": ("nothing more", "XLMRobertaConfig", {}),
    "DeBERTaV2": (
        "relative positions",
        "DebertaV2Config",
        {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 32, "share_att_key": True},
    ),
    "DeepseekV3": (
        "latent vectors",
        "DeepseekV3Config",
        {
            "head_dim": 32,
            "kv_lora_rank": 128,
            "q_lora_rank": 256,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 32,
            "v_head_dim": 64,
            "first_k_dense_replace": 1,
        },
    ),
    "StableLm": ("biases before norms", "StableLmConfig", {"qk_layernorm": True, "use_qkv_bias": True}),
    "GptOss": ("sinks", "GptOssConfig", {"num_local_experts": 2, "num_experts_per_tok": 2}),
}


def main(
    families: Annotated[str, typer.Option(help="Families.")] = ",".join(FAMILIES),
    baselines: Annotated[str, typer.Option(help="Baselines of attn.")] = "itb,zero",
    width: Annotated[int, typer.Option(help="d_model; heads are 64 wide.")] = 768,
    tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 64,
    destinations: Annotated[str, typer.Option(help="Those that hooks is timed on.")] = "21,42,63",
    repeats: Annotated[int, typer.Option(help="Timed runs of each side.")] = 3,
    out: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "engines.json",
) -> None:
    """Seconds of `attn` at the default tolerance, and how far the engines are apart."""
    cells = []
    for family in names(families, FAMILIES):
        has, kind, more = FAMILIES[family]
        model = _model(_config(kind, width, **more))
        for baseline in names(baselines):
            cells.append(
                {"family": family, "has": has, **_cell(model, baseline, tokens, numbers(destinations), repeats)}
            )
    show(
        f"attn of one block, {width} wide, {tokens} tokens, seconds",
        ["family", "attention", "baseline", "closed_form", "hooks, in proportion", "ratio", "apart"],
        [
            [
                *(cell[key] for key in ("family", "has", "baseline")),
                *(f"{cell['closed_form']:.2f}", f"{cell['hooks']:.1f}", f"{cell['ratio']:.0f}", f"{cell['apart']:.0e}"),
            ]
            for cell in cells
        ],
        "apart: largest difference, relative to the largest contribution.",
    )
    settings = {"width": width, "tokens": tokens, "destinations": destinations, "repeats": repeats}
    write_results(out, {"environment": environment(), "settings": settings, "cells": cells})


def _model(config: Any) -> Any:
    torch.manual_seed(0)
    masked = type(config) in tf.AutoModelForMaskedLM._model_mapping
    plain = (tf.AutoModelForMaskedLM if masked else tf.AutoModelForCausalLM).from_config(config)
    for weight in plain.parameters():  # norms of ones would show less
        weight.data += 0.02 * torch.randn_like(weight)
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        words = {"[UNK]": 0} | {f"w{number}": number for number in range(1, VOCAB)}
        tokenizer = tf.PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")), unk_token="[UNK]"
        )
        tokenizer.save_pretrained(folder)
        return ll.load_model(folder, device="cpu")


def _cell(model: Any, baseline: str, tokens: int, some: list[int], repeats: int) -> dict[str, Any]:
    ids = torch.randint(1, VOCAB, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    asked: dict[str, Any] = {"maps": "attn", "attn_baseline": baseline, "progress": False}
    sides = {"closed_form": {}, "hooks": {"destinations": some}}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    flows = {}
    ll.attribute(model, ids, engine="closed_form", **asked)  # finds the block
    for _ in range(repeats):
        for side, more in sides.items():
            start = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ll.ConvergenceWarning)
                flows[side] = ll.attribute(model, ids, engine=side, **asked, **more)
            seconds[side].append(time.perf_counter() - start)
    scale = tokens / len(some)
    closed, hooks = statistics.median(seconds["closed_form"]), scale * statistics.median(seconds["hooks"])
    expected = flows["hooks"].attn
    apart = float((flows["closed_form"].attn[..., some] - expected).abs().max() / expected.abs().max())
    ratio = statistics.median(
        scale * slow / fast for slow, fast in zip(seconds["hooks"], seconds["closed_form"], strict=True)
    )
    return {"baseline": baseline, "closed_form": closed, "hooks": hooks, "ratio": ratio, "apart": apart}


if __name__ == "__main__":
    typer.run(main)
