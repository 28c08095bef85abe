"""Models that switch on the way, by ReLU or by clamps: contributions are right and converge with the default budget."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_models import VOCAB, tiny_tokenizer
from torch import Tensor, nn

import lig_lens as ll
from lig_lens.errors import ConvergenceWarning

IDS, DESTINATIONS = [5, 12, 30, 7, 22], [2, 4]
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0,
    "max_position_embeddings": 64,
}  # fmt: skip
OPT: dict[str, Any] = {**SIZES, "ffn_dim": 64, "activation_function": "relu"}
KINDS = {
    "relu": transformers.OPTConfig(**OPT, word_embed_proj_dim=16),
    "relu, norms after": transformers.OPTConfig(**OPT, word_embed_proj_dim=8, do_layer_norm_before=False),
    "clamps": transformers.OlmoConfig(**SIZES, intermediate_size=32, clip_qkv=0.5),
}
CASES = [(kind, name, start) for kind in KINDS for name in ("attn", "block") for start in ("zero", "itb")]
# All experts are chosen, so that nothing jumps, and clamp what they make.
EXPERTS = transformers.GptOssConfig(
    **SIZES, intermediate_size=32, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=2,
    swiglu_limit=0.2, experts_implementation="eager",
)  # fmt: skip


def pair(kind: str, folder: Path) -> tuple[Any, Any]:
    """A plain model in float64, and the bridge of it."""
    torch.manual_seed(0)
    plain = transformers.AutoModelForCausalLM.from_config({**KINDS, "experts": EXPERTS}[kind]).eval()
    for name, weight in plain.named_parameters():
        weight.data = torch.randn_like(weight) * (0.1 if weight.ndim == 1 else 0.4)
        weight.data += float(weight.ndim == 1 and name.endswith("weight"))
    plain.save_pretrained(folder)
    tiny_tokenizer("gpt2").save_pretrained(folder)
    return plain.double(), ll.load_model(str(folder), device="cpu", dtype="float64")


def integral(integrand: Any) -> Tensor:
    """From 0 to 1, of a function of points [node] that gives [node ...]; halves whatever differs from its halves."""
    x, w = np.polynomial.legendre.leggauss(8)
    share, weights = torch.tensor((x + 1) / 2), torch.tensor(w / 2)

    def of_panels(low: Tensor, high: Tensor) -> Tensor:
        width = (high - low)[:, None]
        values = torch.cat([integrand(part) for part in (low[:, None] + width * share).flatten().split(2000)])
        return torch.einsum("pn,pn...->p...", width * weights, values.unflatten(0, (len(low), -1)))

    edges = torch.tensor([0.0, *np.logspace(-12, 0, 37)])
    low, high = edges[:-1], edges[1:]
    whole, total = of_panels(low, high), torch.zeros(())
    size = whole.sum(0).abs().max()
    for _ in range(40):
        middle = (low + high) / 2
        low, high = torch.cat([low, middle]), torch.cat([middle, high])
        halves = of_panels(low, high)
        left, right = halves.chunk(2)
        open_ = (whole - left - right).abs().flatten(1).amax(-1) > 3e-8 * size
        total = total + (left + right)[~open_].sum(0)
        low, high, whole = low[open_.repeat(2)], high[open_.repeat(2)], halves[open_.repeat(2)]
        if not len(low):
            return total
    raise AssertionError("the oracle does not converge")


def blocks_io(plain: nn.Module) -> tuple[Tensor, Any]:
    """The second block of the plain model: what enters it, and what it makes of others, [item pos] -> outputs."""
    base = plain.model.decoder if hasattr(plain.model, "decoder") else plain.model
    layer, kept = base.layers[1], {}
    handle = layer.register_forward_pre_hook(lambda _m, a, k: kept.update(resid=a[0], rest=k), with_kwargs=True)
    with torch.no_grad():
        plain(torch.tensor([IDS]))
    handle.remove()
    out = layer.self_attn.o_proj if hasattr(layer.self_attn, "o_proj") else layer.self_attn.out_proj

    def run(x: Tensor, name: str) -> Tensor:
        """Vectors [item pos group dim]: of heads, or what leaves the block."""
        rest = {
            key: value.expand(len(x), *value.shape[1:]) if isinstance(value, Tensor) and value.ndim == 4 else value
            for key, value in kept["rest"].items()
        }
        seen = []
        catch = out.register_forward_pre_hook(lambda _m, a: seen.append(a[0]))
        made = layer(x, **rest | {key: None for key in ("past_key_values", "past_key_value") if key in rest})
        catch.remove()
        made = made[0] if isinstance(made, tuple) else made
        return seen[0].reshape(*x.shape[:2], 2, -1) if name == "attn" else made.reshape(x.shape)[:, :, None]

    return kept["resid"][0].detach(), run


def by_hand(plain: nn.Module, name: str, start: str, dst: int) -> Tensor:
    """[group src]."""
    resid, run = blocks_io(plain)
    first = torch.zeros_like(resid) if start == "zero" else resid[dst].expand_as(resid)
    with torch.no_grad():
        at_start = run(first[None], name)[0, dst]

    def integrand(a: Tensor) -> Tensor:
        x = (first + a[:, None, None] * (resid - first)).requires_grad_()
        moved = (run(x, name)[:, dst] - at_start).norm(dim=-1)
        slopes = [torch.autograd.grad(one.sum(), x, retain_graph=True)[0] for one in moved.T]
        return torch.stack([((resid - first) * one).sum(-1) for one in slopes], 1)

    return integral(integrand)


@pytest.mark.parametrize(("kind", "name", "start"), CASES)
def test_kinks_converge_to_what_is_right(kind: str, name: str, start: str, tmp_path: Path) -> None:
    plain, model = pair(kind, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        flow = ll.attribute(
            model, IDS, layers=[1], destinations=DESTINATIONS, maps=name, tol=1e-4, progress=False,
            **{f"{name}_baseline": start},
        )  # fmt: skip
    assert float(errors(flow, plain, name, start).max()) <= 1e-4


def errors(flow: ll.Flow, plain: nn.Module, name: str, start: str) -> Tensor:
    """Of each destination's contributions, the largest relative to the largest of them, over groups."""
    found = flow.columns(name)[0].double().reshape(-1, len(IDS), len(DESTINATIONS))
    worst = []
    for number, dst in enumerate(DESTINATIONS):
        wanted = by_hand(plain, name, start, dst)
        worst.append(((found[..., number] - wanted).abs().amax(-1) / wanted.abs().amax(-1)).max())
    return torch.stack(worst)


@pytest.mark.parametrize("start", ["zero", "itb"])
@pytest.mark.parametrize("tol", [1e-3, 1e-4])
def test_kinks_inside_experts_are_not_taken_for_smooth(tol: float, start: str, tmp_path: Path) -> None:
    """Nobody cuts there, so few cells converge; those that say so have."""
    plain, model = pair("experts", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        flow = ll.attribute(
            model, IDS, layers=[1], destinations=DESTINATIONS, maps="block", block_baseline=start, tol=tol,
            progress=False,
        )  # fmt: skip
    missed = errors(flow, plain, "block", start)
    assert bool((missed <= tol).logical_or(~flow.converged["block"][0]).all())
    assert float(missed.max()) <= 100 * tol
