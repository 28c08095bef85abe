"""Models with an encoder and a decoder, held against the plain transformers model."""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from encoder_decoder_oracle import Plain
from tiny_models import VOCAB, tiny_tokenizer

import lig_lens as ll
from lig_lens.errors import InputError

SOURCE, TARGET = [5, 12, 30, 7, 22], [0, 9, 17, 11]
OTHER_SOURCE, OTHER_TARGET = [5, 12, 11, 7, 22], [0, 9, 8, 11]
T5: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 3,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "activation_function": "gelu", "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
    "decoder_start_token_id": 3, "forced_eos_token_id": 3,
}  # fmt: skip
FAMILIES = {
    "T5ForConditionalGeneration": (T5, "pre_ln"),
    "MT5ForConditionalGeneration": (T5, "pre_ln"),
    "BartForConditionalGeneration": (BART, "post_ln"),
    "MBartForConditionalGeneration": (BART, "pre_ln"),
    "MarianMTModel": (BART, "post_ln"),
    "PegasusForConditionalGeneration": (BART, "pre_ln"),
}
# Where the plain models have their layers, and the linear maps after heads.
T5_AT = {
    "encoder": ("encoder.block", "layer.0.SelfAttention.o"),
    "decoder": ("decoder.block", "layer.0.SelfAttention.o"),
    "cross": ("decoder.block", "layer.1.EncDecAttention.o"),
}
BART_AT = {
    "encoder": ("model.encoder.layers", "self_attn.out_proj"),
    "decoder": ("model.decoder.layers", "self_attn.out_proj"),
    "cross": ("model.decoder.layers", "encoder_attn.out_proj"),
}
ZERO = {"attn_baseline": "zero", "mlp_baseline": "zero", "block_baseline": "zero"}


@functools.cache
def _folder() -> Any:
    return tempfile.TemporaryDirectory(prefix="encoder_decoder_")


@functools.cache
def saved(kind: str) -> str:
    """A checkpoint with random weights that are large enough to matter."""
    folder = Path(_folder().name) / kind
    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**FAMILIES[kind][0])).eval()
    for weight in model.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    model.save_pretrained(folder)
    tiny_tokenizer("gpt2").save_pretrained(folder)
    return str(folder)


@functools.cache
def loaded(kind: str) -> tuple[Any, Any]:
    """The plain model and the bridge, in float64."""
    plain = getattr(transformers, kind).from_pretrained(saved(kind), dtype=torch.float64).eval()
    return plain, ll.load_model(saved(kind), device="cpu", dtype="float64")


def oracle(kind: str, layer: int, stream: str, source: list[int] = SOURCE, target: list[int] = TARGET) -> Plain:
    plain = loaded(kind)[0]
    layers, out = (T5_AT if FAMILIES[kind][0] is T5 else BART_AT)[stream]
    block = plain.get_submodule(layers)[layer]
    return Plain(plain, block, block.get_submodule(out), 4, source, target)


def close(found: torch.Tensor, wanted: torch.Tensor, of_largest: float = 1e-4) -> None:
    assert found.shape == wanted.shape
    assert float((found.double() - wanted).abs().max()) <= of_largest * float(wanted.abs().max())


@pytest.mark.parametrize("stream", ["decoder", "encoder"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_maps_of_self_attention(kind: str, stream: str) -> None:
    flow = ll.attribute(loaded(kind)[1], (SOURCE, TARGET), stream=stream, tol=1e-5, progress=False, **ZERO)
    assert set(flow.layouts) == {FAMILIES[kind][1]}
    for layer in (0, 1):
        expected = oracle(kind, layer, stream).maps_from_zero()
        for name in ("attn", "mlp", "skip", "block"):
            close(getattr(flow, name)[layer], getattr(expected, name))


@pytest.mark.parametrize("kind", FAMILIES)
def test_cross_attention(kind: str) -> None:
    """From the encoder's output, along the path from 0 and from another source's, the decoder held."""
    model = loaded(kind)[1]
    asked = {"stream": "cross", "tol": 1e-6, "progress": False}
    flow = ll.attribute(model, (SOURCE, TARGET), **asked)
    assert flow.maps == ("attn",) and flow.attn.shape == (2, 4, len(SOURCE), len(TARGET)) and not flow.is_square
    other = ll.attribute(model, (SOURCE, TARGET), corrupted=OTHER_SOURCE, attn_baseline="corrupted", **asked)
    start = oracle(kind, 0, "cross", OTHER_SOURCE).encoded()
    for layer in (0, 1):
        plain = oracle(kind, layer, "cross")
        close(flow.attn[layer], plain.across())
        close(other.attn[layer], plain.across(start))
    torch.testing.assert_close(flow.attn.sum(2), flow.total["attn"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stream", ["decoder", "encoder"])
@pytest.mark.parametrize(
    "kind, engine",
    [("T5ForConditionalGeneration", "auto"), ("BartForConditionalGeneration", "hooks"), ("MarianMTModel", "auto")],
)
def test_metric_of_the_logits(kind: str, stream: str, engine: str) -> None:
    """Of both streams at every layer, all that lies behind running along: the encoder's through cross-attention."""
    plain, model = loaded(kind)
    second = (SOURCE, OTHER_TARGET) if stream == "decoder" else (OTHER_SOURCE, TARGET)
    target = ll.logit_difference(9, 17)
    # T5 rounds to float32 inside, whatever its dtype.
    tol = 1e-4 if kind.startswith("T5") else 1e-5
    asked = {"stream": stream, "target": target, "tol": tol, "engine": engine, "progress": False}
    flow = ll.attribute(model, (SOURCE, TARGET), corrupted=second, **asked)

    def difference(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, 9] - logits[0, -1, 17]

    with torch.no_grad():
        clean, corrupted = (
            difference(plain(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([prefix])).logits)
            for source, prefix in ((SOURCE, TARGET), second)
        )
    for layer in (0, 1):
        total = flow.attn[layer].sum() + flow.skip[layer].sum()
        torch.testing.assert_close(total.double(), clean - corrupted, rtol=2e-5, atol=1e-6)
        start = oracle(kind, layer, stream, *second).run(grad=False).resid[0]
        heads, skip = oracle(kind, layer, stream).to_metric(start, difference)
        close(flow.attn[layer], heads)
        close(flow.skip[layer], skip)


@pytest.fixture(scope="module")
def across() -> ll.Flow:
    flow = ll.attribute(
        loaded("BartForConditionalGeneration")[1], ("w1 w2 w3 w4", "w5 w6"), stream="cross", progress=False
    )
    assert isinstance(flow, ll.Flow)
    return flow


def test_two_texts_are_labelled(across: ll.Flow, tmp_path: Path) -> None:
    """Sources are the source's tokens, destinations the target's, in every form that a Flow has."""
    assert across.tokens == ("[CLS]", "w1", "w2", "w3", "w4") and across.dst_tokens == ("[SEP]", "[CLS]", "w5", "w6")
    assert across.dst_special == (True, True, False, False) and across.destinations == (0, 1, 2, 3)
    assert across.settings["stream"] == "cross" and set(across.settings["token_ids"]) == {"source", "target"}
    again = ll.Flow.load(across.save(tmp_path / "across.safetensors"))
    assert (again.tokens, again.dst_tokens, again.dst_special) == (across.tokens, across.dst_tokens, across.dst_special)
    assert torch.equal(again.attn, across.attn) and "5 to 4 tokens" in repr(again)
    frame = across.to_dataframe()
    row = frame[(frame["src"] == 3) & (frame["dst"] == 2)].iloc[0]
    assert (row["src_token"], row["dst_token"]) == ("w3", "w5")
    edge = across.top(1)[0]
    assert edge.src_token == across.tokens[edge.src] and edge.dst_token == across.dst_tokens[edge.dst]
    data = across.to_xarray()
    assert list(data["dst_token"].values) == list(across.dst_tokens)
    assert json.loads(across.to_json())["dst_tokens"] == list(across.dst_tokens)
    some = across.select(destinations=(2,))
    assert some.attn.shape == (2, 4, 5, 1) and some.to_tl().shape == (2, 4, 1, 5)
    mean = ll.average([across, across]).mean
    assert mean.dst_tokens == across.dst_tokens and torch.equal(mean.attn, across.attn)
    figure = ll.plots.head_map(across, 0, 0)
    assert any("w5" in text for text in figure.layout.yaxis.ticktext) and len(figure.layout.yaxis.ticktext) == 4
    ll.plots.head_grid(across)
    ll.plots.gap_map(across)


@pytest.mark.parametrize(
    "call",
    [
        lambda flow: flow.compose(),
        lambda flow: flow.rollout(),
        lambda flow: flow.paths(0),
        lambda flow: flow.graph(),
        lambda flow: flow.consistency(),
        lambda flow: flow.explore(),
        lambda flow: ll.plots.head_map(flow, 0, 0, tokens=[0]),
    ],
)
def test_what_needs_one_text_is_refused(across: ll.Flow, call: Any) -> None:
    with pytest.raises(InputError, match="from one"):
        call(across)
