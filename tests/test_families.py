"""Families of models as checkpoints, loaded as a user would: their logits, their maps, and what is refused."""

import copy
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import GPT2, GQA, IDS, OTHER, SMALL, saved
from family_oracle import maps_from_zero
from tiny_models import VOCAB
from transformer_lens.model_bridge import TransformerBridge

import lig_lens as ll
from lig_lens.errors import InputError
from lig_lens.models.served import _without_alias

ENCODERS = {
    "RobertaForMaskedLM": SMALL,
    "XLMRobertaForMaskedLM": SMALL,
    "CamembertForMaskedLM": SMALL,
    "ElectraForMaskedLM": {**SMALL, "embedding_size": 16},
}
OTHERS = {"PhimoeForCausalLM": {**GQA, "num_local_experts": 2, "num_experts_per_tok": 2}}
CLASSIFIERS = {
    "BertForSequenceClassification": SMALL,
    "RobertaForSequenceClassification": SMALL,
    "XLMRobertaForSequenceClassification": SMALL,
    "ElectraForSequenceClassification": SMALL,
    "GPT2ForSequenceClassification": {**GPT2, "pad_token_id": 0},
    "LlamaForSequenceClassification": GQA,
    "MistralForSequenceClassification": GQA,
    "Qwen2ForSequenceClassification": GQA,
}


BERT_LAYER = ("{body}.encoder.layer", "attention.output.dense")
LLAMA_LAYER = ("model.layers", "self_attn.o_proj")
# Class -> config, where its layers are, and in each the linear map after the heads; and the layout.
FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, str], str]] = {
    "XLMRobertaForMaskedLM": (SMALL, BERT_LAYER, "post_ln"),
    "CamembertForMaskedLM": (SMALL, BERT_LAYER, "post_ln"),
    "ElectraForMaskedLM": (ENCODERS["ElectraForMaskedLM"], BERT_LAYER, "post_ln"),
    "LlamaForSequenceClassification": (GQA, LLAMA_LAYER, "pre_ln"),
    "GraniteForCausalLM": (
        {**GQA, "residual_multiplier": 0.22, "attention_multiplier": 0.3, "embedding_multiplier": 2.0},
        LLAMA_LAYER,
        "scaled_pre_ln",
    ),
    "OPTForCausalLM": (
        {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "activation_function": "gelu"},  # kinks need finer rules
        ("model.decoder.layers", "self_attn.out_proj"),
        "pre_ln",
    ),
    "MistralForCausalLM": ({**GQA, "sliding_window": 3}, LLAMA_LAYER, "pre_ln"),
    "Qwen2ForCausalLM": (GQA, LLAMA_LAYER, "pre_ln"),
    "Qwen3ForCausalLM": ({**GQA, "head_dim": 8}, LLAMA_LAYER, "pre_ln"),
    "Olmo2ForCausalLM": (GQA, LLAMA_LAYER, "pre_post_ln"),
    "StableLmForCausalLM": (GQA, LLAMA_LAYER, "pre_ln"),
    "PhiForCausalLM": ({**SMALL, "pad_token_id": 0}, ("model.layers", "self_attn.dense"), "parallel"),
    "CohereForCausalLM": (GQA, LLAMA_LAYER, "parallel"),
    "Starcoder2ForCausalLM": (GQA, LLAMA_LAYER, "pre_ln"),
    "GemmaForCausalLM": ({**GQA, "head_dim": 8}, LLAMA_LAYER, "pre_ln"),
    "OlmoForCausalLM": (GQA, LLAMA_LAYER, "pre_ln"),
    "NemotronForCausalLM": ({**GQA, "hidden_act": "gelu"}, LLAMA_LAYER, "pre_ln"),
    "Phi3ForCausalLM": (GQA, LLAMA_LAYER, "pre_ln"),
    "SmolLM3ForCausalLM": (GQA, LLAMA_LAYER, "pre_ln"),
    "Ernie4_5ForCausalLM": (GQA, LLAMA_LAYER, "pre_ln"),
    "ApertusForCausalLM": (GQA, LLAMA_LAYER, "pre_ln"),
    "BloomForCausalLM": (
        {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        ("transformer.h", "self_attention.dense"),
        "pre_ln",
    ),
    "FalconForCausalLM": (
        {**SMALL, "multi_query": True, "new_decoder_architecture": False, "parallel_attn": True},
        ("transformer.h", "self_attention.dense"),
        "parallel",
    ),
    "GPTNeoForCausalLM": (
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "window_size": 3,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
        },
        ("transformer.h", "attn.attention.out_proj"),
        "pre_ln",
    ),
}


# Cohere's pairs of rotated dimensions are others in TransformerLens 3.9.
BRIDGES_THAT_DIFFER = {("CohereForCausalLM", "3.")}


@pytest.mark.parametrize("kind", FAMILIES)
def test_maps_are_those_of_the_plain_model(kind: str, tmp_path: Path) -> None:
    """Against autograd through the plain transformers model, in float64."""
    config, (layers, out), layout = FAMILIES[kind]
    plain = saved(kind, tmp_path, **config).double()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", ll.BridgeWarning)
        model = ll.load_model(str(tmp_path), device="cpu", dtype="float64")
    if any(issubclass(one.category, ll.BridgeWarning) for one in warned):
        assert (kind, version("transformer_lens")[:2]) in BRIDGES_THAT_DIFFER
        pytest.skip("this bridge computes something else, which is said on loading")
    layer = plain.get_submodule(layers.format(body=plain.base_model_prefix))[1]
    expected = maps_from_zero(plain, layer, layer.get_submodule(out), 4, input_ids=torch.tensor([IDS[:4]]))
    asked = {"attn_baseline": "zero", "mlp_baseline": "zero", "block_baseline": "zero"}
    flow = ll.attribute(model, IDS[:4], layers=[1], tol=1e-5, max_nodes=8192, progress=False, **asked)
    assert flow.layouts == (layout,)
    for name in ("attn", "mlp", "skip", "block"):
        found, wanted = getattr(flow, name)[0].double(), getattr(expected, name)
        assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max()), name


def test_norms_that_see_flattened_positions(tmp_path: Path) -> None:
    """OPT flattens items and positions before its second norm; a bridge without familiar names shows it so."""
    saved("OPTForCausalLM", tmp_path, **FAMILIES["OPTForCausalLM"][0])
    flows = [
        ll.attribute(model, IDS, progress=False)
        for model in (
            TransformerBridge.boot_transformers(str(tmp_path), device="cpu"),
            ll.load_model(str(tmp_path), device="cpu"),
        )
    ]
    for name in flows[0].maps:
        torch.testing.assert_close(getattr(flows[0], name), getattr(flows[1], name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [*ENCODERS, *OTHERS, *CLASSIFIERS])
def test_logits_are_those_of_the_plain_model(kind: str, tmp_path: Path) -> None:
    plain = saved(kind, tmp_path, **{**ENCODERS, **OTHERS, **CLASSIFIERS}[kind])
    model = ll.load_model(str(tmp_path), device="cpu")
    ids = torch.tensor([IDS])
    with torch.no_grad():
        expected, found = plain(ids).logits, model(ids)
    found = found if isinstance(found, torch.Tensor) else found[0]
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_have_all_maps(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path, **ENCODERS[kind])
    model = ll.load_model(str(tmp_path), device="cpu")
    flow = ll.attribute(model, IDS, progress=False)
    assert flow.maps == ("attn", "mlp", "block") and set(flow.layouts) == {"post_ln"}
    assert all(bool(flow.converged[name].all()) for name in flow.maps)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_classes_are_explained(kind: str, tmp_path: Path) -> None:
    """The contributions of every layer add up to the change of the classifier's own logit."""
    plain = saved(kind, tmp_path, **CLASSIFIERS[kind])
    model = ll.load_model(str(tmp_path), device="cpu")
    with torch.no_grad():
        change = float((plain(torch.tensor([IDS])).logits - plain(torch.tensor([OTHER])).logits)[0, 1])
    flow = ll.attribute(model, IDS, corrupted=OTHER, target=ll.class_logit(1), progress=False)
    torch.testing.assert_close(
        (flow.attn.sum((1, 2, 3)) + flow.skip.sum(1)).double(), torch.full((2,), change).double(), rtol=2e-3, atol=1e-5
    )


@pytest.mark.parametrize(
    "kind, config, missing",
    [
        ("BertModel", SMALL, "cls.predictions"),
        ("LlamaModel", {**GQA, "tie_word_embeddings": False}, "lm_head.weight"),
        ("RobertaModel", SMALL, "lm_head"),
    ],
)
def test_a_head_that_was_never_loaded_is_named(kind: str, config: dict[str, Any], missing: str, tmp_path: Path) -> None:
    saved(kind, tmp_path, **config)
    model = ll.load_model(str(tmp_path), device="cpu")
    asked = {"corrupted": OTHER, "progress": False}
    for target in (ll.logit_difference(9, 17), ll.metric(lambda logits: logits[0, -1, 3])):
        with pytest.raises(InputError, match=rf"random weights: {missing}.*saved as {kind}"):
            ll.attribute(model, IDS, target=target, **asked)
    with pytest.raises(InputError, match="random weights"):
        ll.patching.patch(model, IDS, OTHER, ll.logit_difference(9, 17), progress=False)
    ll.attribute(model, IDS, maps="attn", layers=[0], progress=False)  # needs no head
    for other in (copy.deepcopy(model), copy.deepcopy(model).to(torch.bfloat16)):
        with pytest.raises(InputError, match="random weights"):
            ll.attribute(other, IDS, target=ll.logit_difference(9, 17), **asked)
    for name, weight in model.original_model.named_parameters():
        if "lm_head" in name or "cls" in name:
            weight.data.normal_()
    ll.attribute(model, IDS, target=ll.logit_difference(9, 17), layers=[1], **asked)  # trained weights were put in


def test_another_head_than_the_models_own_is_named(tmp_path: Path) -> None:
    saved("GPT2ForTokenClassification", tmp_path, **GPT2)
    model = ll.load_model(str(tmp_path), device="cpu")
    with pytest.raises(InputError, match=r"saved as GPT2ForTokenClassification, .* loaded as GPT2LMHeadModel"):
        ll.attribute(model, IDS, corrupted=OTHER, target=ll.logit_difference(9, 17), progress=False)


def test_blocks_that_were_never_loaded_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved("GPT2LMHeadModel", tmp_path, **GPT2)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["transformer.h.1.attn.c_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks weights of its blocks: transformer\.h\.1\.attn\.c_proj\.weight"):
        ll.load_model(str(tmp_path))


def test_a_family_that_is_not_served_is_named(tmp_path: Path) -> None:
    config = transformers.FunnelConfig(vocab_size=VOCAB, d_model=32, n_head=4, d_head=8, d_inner=48, block_sizes=[1, 1])
    transformers.FunnelModel(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"FunnelModel \(model_type 'funnel'\) is served neither by"):
        ll.load_model(str(tmp_path))


def test_a_bridge_that_computes_something_else_is_named(tmp_path: Path) -> None:
    """Falcon with ALiBi: eager attention, which bridges need, adds the bias twice in transformers 5.23."""
    config = {**SMALL, "multi_query": False, "alibi": True, "parallel_attn": False, "new_decoder_architecture": False}
    saved("FalconForCausalLM", tmp_path, **config)
    with pytest.warns(ll.BridgeWarning, match="gives other logits than the plain FalconForCausalLM"):
        ll.load_model(str(tmp_path), device="cpu")


def test_a_classifier_of_another_shape_is_named(tmp_path: Path) -> None:
    config = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    saved("T5ForSequenceClassification", tmp_path, **config)
    with pytest.raises(InputError, match="T5ForSequenceClassification is no classifier that lig_lens knows"):
        ll.load_model(str(tmp_path))


def test_names_of_transformer_lens_stand_for_hub_ids() -> None:
    assert _without_alias("gpt2-small") == "gpt2" and _without_alias("no/alias") == "no/alias"
