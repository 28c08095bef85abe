"""Models with an encoder and a decoder, held against the plain transformers model."""

import copy
import functools
import json
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from encoder_decoder_oracle import Held, Plain
from family_oracle import maps_from_zero, missed
from recorded import held
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
SWITCH: dict[str, Any] = {
    **T5, "d_kv": 8, "feed_forward_proj": "gelu", "num_experts": 4, "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
}  # fmt: skip
CONFIGS = {kind: config for kind, (config, _) in FAMILIES.items()} | {
    "T5EncoderModel": T5,
    "SwitchTransformersForConditionalGeneration": SWITCH,
}
# Bridges that take T5's attention to give two values, where transformers 5.23 gives three.
RUN_NOT_IN = dict.fromkeys(("T5ForConditionalGeneration", "MT5ForConditionalGeneration"), ("3.",))
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
    model = model_class(model_class.config_class(**CONFIGS[kind])).eval()
    for weight in model.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    model.save_pretrained(folder)
    tiny_tokenizer("gpt2").save_pretrained(folder)
    return str(folder)


@functools.cache
def loaded(kind: str) -> tuple[Any, Any]:
    """The plain model and the bridge, in float64."""
    if version("transformer_lens")[:2] in RUN_NOT_IN.get(kind, ()):
        with pytest.raises(InputError, match=rf"cannot run in float32 .*which the plain {kind} can"):
            ll.load_model(saved(kind), device="cpu")
        pytest.skip("this bridge does not run, which is said on loading")
    plain = getattr(transformers, kind).from_pretrained(saved(kind), dtype=torch.float64).eval()
    return plain, ll.load_model(saved(kind), device="cpu", dtype="float64")


def oracle(kind: str, layer: int, stream: str, source: list[int] = SOURCE, target: list[int] = TARGET) -> Plain:
    plain = loaded(kind)[0]
    layers, out = (BART_AT if CONFIGS[kind] is BART else T5_AT)[stream]
    block = plain.get_submodule(layers)[layer]
    return Plain(plain, block, block.get_submodule(out), 4, source, target)


def close(found: torch.Tensor, wanted: torch.Tensor, of_largest: float = 1e-4) -> None:
    assert found.shape == wanted.shape
    assert float((found.double() - wanted).abs().max()) <= of_largest * float(wanted.abs().max())


@pytest.mark.parametrize("stream", ["decoder", "encoder"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_maps_of_self_attention(kind: str, stream: str) -> None:
    layers = (0, 1) if kind == "T5ForConditionalGeneration" else (1,)  # T5's first block hands its position bias on
    asked: dict[str, Any] = {"stream": stream, "tol": 1e-5, "progress": False, **ZERO}
    flow = ll.attribute(loaded(kind)[1], (SOURCE, TARGET), layers=layers, **asked)
    assert set(flow.layouts) == {FAMILIES[kind][1]}
    for row, layer in enumerate(layers):
        expected = oracle(kind, layer, stream).maps_from_zero()
        held(f"{kind}, {stream}", "source and target", flow, missed(flow, expected, 1e-4, row))


@pytest.mark.parametrize("kind", FAMILIES)
def test_cross_attention(kind: str) -> None:
    """From the encoder's output, along the path from 0 and from another source's, the decoder held."""
    model = loaded(kind)[1]
    asked = {"stream": "cross", "tol": 1e-6, "progress": False}
    flow = ll.attribute(model, (SOURCE, TARGET), **asked)
    assert flow.engines == {"attn": ("closed_form", "closed_form")}
    by_autograd = ll.attribute(model, (SOURCE, TARGET), engine="hooks", **asked)
    assert flow.maps == ("attn",) and flow.attn.shape == (2, 4, len(SOURCE), len(TARGET)) and not flow.is_square
    other = ll.attribute(model, (SOURCE, TARGET), corrupted=OTHER_SOURCE, attn_baseline="corrupted", **asked)
    start = oracle(kind, 0, "cross", OTHER_SOURCE).encoded()
    for layer in (0, 1):
        plain = oracle(kind, layer, "cross")
        expected = plain.across()
        close(flow.attn[layer], expected)
        held(
            f"{kind}, cross",
            "source and target",
            flow,
            float((flow.attn[layer] - expected).abs().max() / expected.abs().max()),
        )
        close(by_autograd.attn[layer], plain.across())
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
    assert across.tokens == ("w1", "w2", "w3", "w4") and across.dst_tokens == ("[SEP]", "w5", "w6")
    assert across.dst_special == (True, False, False) and across.destinations == (0, 1, 2)
    assert across.settings["stream"] == "cross" and set(across.settings["token_ids"]) == {"source", "target"}
    again = ll.Flow.load(across.save(tmp_path / "across.safetensors"))
    assert (again.tokens, again.dst_tokens, again.dst_special) == (across.tokens, across.dst_tokens, across.dst_special)
    assert torch.equal(again.attn, across.attn) and "4 to 3 tokens" in repr(again)
    frame = across.to_dataframe()
    row = frame[(frame["src"] == 2) & (frame["dst"] == 1)].iloc[0]
    assert (row["src_token"], row["dst_token"]) == ("w3", "w5")
    edge = across.top(1)[0]
    assert edge.src_token == across.tokens[edge.src] and edge.dst_token == across.dst_tokens[edge.dst]
    data = across.to_xarray()
    assert list(data["dst_token"].values) == list(across.dst_tokens)
    assert json.loads(across.to_json())["dst_tokens"] == list(across.dst_tokens)
    some = across.select(destinations=(2,))
    assert some.attn.shape == (2, 4, 4, 1) and some.to_tl().shape == (2, 4, 1, 4)
    mean = ll.average([across, across]).mean
    assert mean.dst_tokens == across.dst_tokens and torch.equal(mean.attn, across.attn)
    figure = ll.plots.head_map(across, 0, 0)
    assert any("w5" in text for text in figure.layout.yaxis.ticktext) and len(figure.layout.yaxis.ticktext) == 3
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


@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_are_those_of_the_plain_model(kind: str) -> None:
    plain, model = loaded(kind)
    source, target = torch.tensor([SOURCE]), torch.tensor([TARGET])
    with torch.no_grad():
        expected = plain(input_ids=source, decoder_input_ids=target).logits
        torch.testing.assert_close(model(source, decoder_input_ids=target), expected, rtol=1e-5, atol=1e-5)


def test_a_target_text_goes_on_from_its_start() -> None:
    """The decoder gets its start token and the text, without what would end it; padding of the source is dropped."""
    model = loaded("BartForConditionalGeneration")[1]
    asked: dict[str, Any] = {"maps": "attn", "layers": [0], "progress": False}
    texts = ll.attribute(model, ("w1 w2", "w3"), **asked)
    assert texts.settings["token_ids"] == {"source": [6, 7], "target": [3, 8]}
    assert (texts.tokens, texts.stream) == (("[SEP]", "w3"), "decoder")
    same = ll.attribute(model, (torch.tensor([6, 7, 0, 0]), [[3, 8]]), **asked)
    assert torch.equal(same.attn, texts.attn)
    masked = ll.attribute(model, ([6, 7, 9], [3, 8]), attention_mask=[1, 1, 0], **asked)
    assert torch.equal(masked.attn, texts.attn)
    # The start token may be the one that pads.
    padded = ll.attribute(loaded("T5ForConditionalGeneration")[1], ([6, 7, 0], [0, 8]), **asked)
    assert padded.settings["token_ids"] == {"source": [6, 7], "target": [0, 8]}
    alone = ll.attribute(model, "w1 w2", stream="encoder", **asked)
    assert alone.settings["token_ids"] == {"source": [6, 7], "target": [3]} and len(alone.tokens) == 2
    several = ll.attribute(model, [("w1 w2", "w3"), ("w4", "")], **asked)
    assert [len(flow.tokens) for flow in several] == [2, 1] and torch.equal(several[0].attn, texts.attn)


def test_directions_across() -> None:
    """Contributions to a direction add up to how far heads move along it, through W_O."""
    kind, w = "T5ForConditionalGeneration", torch.randn(32, generator=torch.Generator().manual_seed(1)).double()
    asked: dict[str, Any] = {"stream": "cross", "target": ll.direction(w), "tol": 1e-6, "progress": False}
    flow = ll.attribute(loaded(kind)[1], (SOURCE, TARGET), layers=[1], destinations=[1, -1], **asked)
    plain = oracle(kind, 1, "cross")
    clean = plain.run(grad=False)
    start = plain.run(Held(clean.resid), torch.zeros_like(plain.encoded())[None], grad=False)
    moved = torch.einsum("phe,mhe,m->hp", (clean.z - start.z)[0], plain.out.weight.reshape(32, 4, 6), w)
    close(flow.attn[0].sum(1), moved[:, [1, 3]].detach(), 1e-5)


def test_a_tensor_across() -> None:
    """One that every source starts from, and one for each layer."""
    kind = "BartForConditionalGeneration"
    start = torch.randn(len(SOURCE), 32, generator=torch.Generator().manual_seed(2)).double()
    asked: dict[str, Any] = {"stream": "cross", "tol": 1e-6, "progress": False}
    model = loaded(kind)[1]
    flow = ll.attribute(model, (SOURCE, TARGET), attn_baseline=start, **asked)
    close(flow.attn[1], oracle(kind, 1, "cross").across(start))
    layers = ll.attribute(model, (SOURCE, TARGET), attn_baseline=torch.stack([start, start]), **asked)
    assert torch.equal(layers.attn, flow.attn)


def test_sources_end_as_the_model_was_trained(tmp_path: Path) -> None:
    """T5's tokenizer ends a text with </s>, which TransformerLens would put in front of it."""
    words = ["<pad>", "</s>", "<unk>", *(f"▁w{number}" for number in range(8))]
    vocab = [(word, 0.0 if number < 3 else -1.0) for number, word in enumerate(words)]
    for kind in ("T5EncoderModel", "T5ForConditionalGeneration"):
        plain = getattr(transformers, kind).from_pretrained(saved(kind))
        plain.save_pretrained(tmp_path / kind)
        transformers.T5Tokenizer(vocab=vocab, extra_ids=0).save_pretrained(tmp_path / kind)
        if version("transformer_lens")[:2] in RUN_NOT_IN.get(kind, ()):
            continue
        model = ll.load_model(str(tmp_path / kind), device="cpu")
        stream = None if kind == "T5EncoderModel" else "cross"
        prompt = "w1 w2" if stream is None else ("w1 w2", "w3")
        flow = ll.attribute(model, prompt, stream=stream, maps="attn", layers=[0], progress=False)
        assert flow.tokens[-1] == "</s>" and len(flow.tokens) == 3
        assert flow.special == (False, False, True)
        if stream is not None:
            assert flow.settings["token_ids"] == {"source": [4, 5, 1], "target": [0, 6]}


@pytest.mark.parametrize("stream", ["decoder", "encoder", "cross"])
def test_several_prompts_are_each_their_own(stream: str) -> None:
    """What is known of a block from one prompt holds for others, of other lengths on either side."""
    model = loaded("BartForConditionalGeneration")[1]
    asked: dict[str, Any] = {"stream": stream, "maps": "attn", "progress": False}
    prompts = [(SOURCE, TARGET), ([4, *SOURCE, 8], TARGET[:3]), (OTHER_SOURCE[:3], [3])]
    for prompt, flow in zip(prompts, ll.attribute(model, prompts, **asked), strict=True):
        alone = ll.attribute(copy.deepcopy(model), prompt, **asked)
        torch.testing.assert_close(flow.attn, alone.attn, rtol=1e-5, atol=1e-6)


def test_messages_add_up_to_what_sources_do() -> None:
    """With a metric, heads' outputs split by message have the same sums, by either engine."""
    asked: dict[str, Any] = {"target": ll.logit_difference(9, 17), "corrupted": (OTHER_SOURCE, TARGET), "tol": 1e-5}
    flows = [
        ll.attribute(
            loaded("BartForConditionalGeneration")[1],
            (SOURCE, TARGET),
            **asked,
            stream="encoder",
            split=split,
            engine=engine,
            progress=False,
        )
        for split, engine in (("source", "auto"), ("message", "auto"), ("message", "hooks"))
    ]
    for flow in flows[1:]:
        torch.testing.assert_close(flow.attn.sum(2), flows[0].attn.sum(2), rtol=1e-4, atol=1e-6)


def test_stacks_of_different_depths(tmp_path: Path) -> None:
    config = transformers.BlenderbotConfig(**{**BART, "encoder_layers": 1, "decoder_layers": 3})
    transformers.BlenderbotForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny_tokenizer("gpt2").save_pretrained(tmp_path)
    model = ll.load_model(str(tmp_path), device="cpu")
    layers = {s: ll.attribute(model, PAIR, stream=s, maps="attn", progress=False).layers for s in ("encoder", "cross")}
    assert layers == {"encoder": (0,), "cross": (0, 1, 2)}
    with pytest.raises(InputError, match="1"):
        ll.attribute(model, PAIR, stream="encoder", layers=[1], progress=False)


def test_targets_without_a_known_start_are_named() -> None:
    model = copy.deepcopy(loaded("BartForConditionalGeneration")[1])
    for config in (model.original_model.config, model.original_model.generation_config):
        config.decoder_start_token_id = None
    with pytest.raises(InputError, match=r"decoder_start_token_id\): pass the prompt's target as token ids"):
        ll.attribute(model, ("w1 w2", "w3"), progress=False)


PAIR = (SOURCE, TARGET)
REFUSED = {
    "no pair": ((SOURCE,), {}, r"is a pair, \(source, target\)"),
    "one text of a batch": ((["w1", "w2"],), {}, r"Prompt 0 of 2: .* is a pair"),
    "unknown stream": ((PAIR,), {"stream": "both"}, "Unknown stream 'both': use one of 'decoder', 'encoder', 'cross'"),
    "itb across": ((PAIR,), {"stream": "cross", "attn_baseline": "itb"}, "attn_baseline='itb' starts where .*'zero'"),
    "block across": ((PAIR,), {"stream": "cross", "maps": "block"}, "attn map alone"),
    "metric across": ((PAIR,), {"stream": "cross", "target": ll.logit_difference(9, 17)}, "not with a metric"),
    "shorter source": (
        (PAIR,),
        {"stream": "cross", "attn_baseline": "corrupted", "corrupted": SOURCE[:-1]},
        "corrupted has 4 tokens, the prompt 5",
    ),
    "other source, decoder's metric": (
        (PAIR,),
        {"target": ll.logit_difference(9, 17), "corrupted": (OTHER_SOURCE, OTHER_TARGET)},
        "corrupted has another source .*stream='encoder'",
    ),
    "other target, encoder's metric": (
        (PAIR,),
        {"stream": "encoder", "target": ll.logit_difference(9, 17), "corrupted": (OTHER_SOURCE, OTHER_TARGET)},
        "corrupted has another target .*stream='decoder'",
    ),
    "marks of its own": (
        (("w1", "w2"),),
        {"prepend_bos": True},
        "prepend_bos=True: the prompt's source is read as its tokenizer marks it",
    ),
    "no tokens": (((SOURCE, []),), {}, "prompt's target is empty"),
    "destination": ((PAIR,), {"stream": "cross", "destinations": [4]}, "4"),
    "nothing moves": (
        (PAIR,),
        {"stream": "cross", "attn_baseline": "corrupted", "corrupted": SOURCE},
        "corrupted equals the prompt",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_explained_is_named(case: str) -> None:
    prompt, asked, match = REFUSED[case]
    with pytest.raises(InputError, match=match):
        ll.attribute(loaded("BartForConditionalGeneration")[1], *prompt, progress=False, **asked)


def test_interventions_name_what_they_cannot_work_on() -> None:
    model = loaded("BartForConditionalGeneration")[1]
    with pytest.raises(InputError, match="one stack of blocks"):
        ll.patching.patch(model, PAIR, PAIR, ll.logit_difference(9, 17), progress=False)


def test_one_stack_has_no_streams() -> None:
    with pytest.raises(InputError, match=r"has one stack of blocks.* leave stream out"):
        ll.attribute(ll.load_model("induction"), "lamp lake", stream="encoder", progress=False)


@pytest.mark.parametrize("kind", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_boundaries_of_each_stream(kind: str) -> None:
    model, layout = loaded(kind)[1], FAMILIES[kind][1]
    for stream, prefix, attention in (
        ("encoder", "encoder_blocks.0", "attn"),
        ("decoder", "decoder_blocks.0", "self_attn"),
        ("cross", "decoder_blocks.0", "cross_attn"),
    ):
        first = ll.describe_boundaries(model, stream=stream)[0]
        assert first.hook_z == f"{prefix}.{attention}.hook_z" and first.hook_z in model.hook_dict
        assert first.layout == ("cross" if stream == "cross" else layout)
        assert first.resid_post == f"{prefix}.hook_resid_post"
    # Both attentions of one block are known side by side.
    assert [ll.describe_boundaries(model, PAIR, stream=s)[0].layout for s in ("decoder", "cross")] == [layout, "cross"]


def test_an_encoder_alone() -> None:
    """T5's encoder has one stack, no head, and the maps that it has within the whole model."""
    plain, model = loaded("T5EncoderModel")
    ids = torch.tensor([SOURCE])
    with torch.no_grad():
        torch.testing.assert_close(model(ids), plain(input_ids=ids).last_hidden_state, rtol=1e-5, atol=1e-5)
    flow = ll.attribute(model, SOURCE, layers=[1], tol=1e-5, progress=False, **ZERO)
    assert flow.stream is None and set(flow.layouts) == {"pre_ln"}
    block = plain.encoder.block[1]
    missed(flow, maps_from_zero(plain, block, block.layer[0].SelfAttention.o, 4, input_ids=ids), 1e-4)
    asked: dict[str, Any] = {"corrupted": OTHER_SOURCE, "progress": False}
    similarity = ll.attribute(model, SOURCE, target=ll.metric(lambda output: output[0].mean(0)[3]), **asked)
    assert float((similarity.total["attn"][0] - similarity.total["attn"][1]).abs()) < 1e-4
    with pytest.raises(InputError, match="saved as T5EncoderModel, which has no head"):
        ll.attribute(model, SOURCE, target=ll.logit_difference(9, 17), **asked)


@pytest.mark.parametrize("stream", ["encoder", "cross"])
def test_switch_transformers(stream: str) -> None:
    """Attention as in T5; what follows may jump from one expert to another, where no rule adds up."""
    kind = "SwitchTransformersForConditionalGeneration"
    asked: dict[str, Any] = {"stream": stream, "maps": "attn", "attn_baseline": "zero", "tol": 1e-5}
    flow = ll.attribute(loaded(kind)[1], (SOURCE, TARGET), layers=[1], progress=False, **asked)
    plain = oracle(kind, 1, stream)
    close(flow.attn[0], plain.across() if stream == "cross" else plain.maps_from_zero().attn)


def test_heads_of_a_size_that_the_bridge_does_not_know(tmp_path: Path) -> None:
    """Switch transformers whose heads are not d_model / n_heads wide: the bridge knows no such, so blocks are whole."""
    config = {**SWITCH, "d_kv": 6}
    plain = transformers.SwitchTransformersForConditionalGeneration(transformers.SwitchTransformersConfig(**config))
    plain.save_pretrained(tmp_path)
    tiny_tokenizer("gpt2").save_pretrained(tmp_path)
    model = ll.load_model(str(tmp_path), device="cpu")
    assert {one.layout for one in ll.describe_boundaries(model)} <= {"block_only", "pre_ln"}


@pytest.mark.parametrize("stream", ["encoder", "decoder"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_half_precision_computes_in_single(kind: str, stream: str) -> None:
    loaded(kind)  # skips what cannot be loaded
    model = ll.load_model(saved(kind), device="cpu", dtype="bfloat16")
    second = (SOURCE, OTHER_TARGET) if stream == "decoder" else (OTHER_SOURCE, TARGET)
    asked: dict[str, Any] = {"stream": stream, "target": ll.logit_difference(9, 17), "layers": [1], "progress": False}
    flows = []
    for dtype in (torch.bfloat16, torch.float32):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ll.ConvergenceWarning)
            flows.append(ll.attribute(model.to(dtype), (SOURCE, TARGET), corrupted=second, **asked))
    assert float((flows[0].attn - flows[1].attn).abs().max()) <= 0.02 * float(flows[1].attn.abs().max())
