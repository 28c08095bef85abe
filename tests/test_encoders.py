"""Encoders that adapters of this package serve, against the plain transformers models."""

import copy
import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import IDS, OTHER, SMALL, saved
from engine_pairs import both, difference
from family_oracle import maps_from_zero, missed
from recorded import held
from tiny_models import VOCAB, tiny_tokenizer

import lig_lens as ll
from lig_lens.errors import BoundaryError, InputError


@dataclass(frozen=True)
class Family:
    """What is tested of classes `<name>ForMaskedLM` and the like.

    Attributes:
        name: see above.
        config: of a tiny model.
        layers: where the plain model has its layers.
        out: in a layer, the linear map after its heads.
        head: how the names of weights begin that a model without a head lacks.
        layout: of its blocks.
        engine: that serves them.
    """

    name: str
    config: dict[str, Any]
    layers: str
    out: str
    head: str
    layout: str = "post_ln"
    engine: str = "closed_form"


TOKENS = dict.fromkeys(("pad_token_id", "cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id"), 0)
DISTILBERT = {"vocab_size": VOCAB, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
RELATIVE = {
    **SMALL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False,
    "type_vocab_size": 0,
}  # fmt: skip
DEBERTA_LAYERS = ("deberta.encoder.layer", "attention.output.dense", "cls.predictions")
ALBERT = Family(
    "Albert",
    {**SMALL, "embedding_size": 16},
    "albert.encoder.albert_layer_groups",
    "albert_layers.0.attention.dense",
    "predictions",
)
MODERNBERT = Family(
    "ModernBert",
    {**SMALL, **TOKENS, "local_attention": 2, "global_attn_every_n_layers": 2},
    "model.layers",
    "attn.Wo",
    "head.dense",
    "pre_ln",
)
DEBERTA = Family("Deberta", RELATIVE, *DEBERTA_LAYERS)
DEBERTA_V2 = Family(
    "DebertaV2",
    {**RELATIVE, "share_att_key": True, "position_buckets": 4, "norm_rel_ebd": "layer_norm"},
    *DEBERTA_LAYERS,
)
FAMILIES = (
    ALBERT,
    Family("DistilBert", DISTILBERT, "distilbert.transformer.layer", "attention.out_lin", "vocab_transform"),
    Family("MPNet", SMALL, "mpnet.encoder.layer", "attention.attn.o", "lm_head"),
    MODERNBERT,
    DEBERTA,
    DEBERTA_V2,
)
# Families with the modules of one above, or of BERT with its norms elsewhere.
LAST_LINEAR = "attention.output.dense"
OTHERS = (
    Family("Data2VecText", SMALL, "data2vec_text.encoder.layer", LAST_LINEAR, "lm_head"),
    Family("Ernie", SMALL, "ernie.encoder.layer", LAST_LINEAR, "cls.predictions"),
    Family("NomicBert", SMALL, "nomic_bert.layers", "self_attn.o_proj", "cls.predictions"),
    Family("Gte", SMALL, "gte.layers", "self_attn.o_proj", "lm_head"),
    Family("JinaEmbeddingsV3", SMALL, "roberta.layers", "self_attn.o_proj", "lm_head"),
    Family("EuroBert", {**SMALL, **TOKENS, "num_key_value_heads": 2}, "model.layers", "self_attn.o_proj", "", "pre_ln"),
    Family("MegatronBert", SMALL, "bert.encoder.layer", LAST_LINEAR, "cls.predictions", "pre_ln"),
    Family("RobertaPreLayerNorm", SMALL, "roberta_prelayernorm.encoder.layer", LAST_LINEAR, "lm_head", "pre_ln"),
    Family("XLMRobertaXL", SMALL, "roberta.encoder.layer", LAST_LINEAR, "lm_head", "pre_ln"),
    Family(
        "Esm",
        {**SMALL, "position_embedding_type": "rotary", "pad_token_id": 1, "mask_token_id": 4},
        "esm.encoder.layer",
        LAST_LINEAR,
        "lm_head",
        "pre_ln",
        "hooks",
    ),
)
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        output = model(torch.tensor([ids]))
    return getattr(output, "logits", output)


def assert_same_logits(model: Any, plain: Any) -> None:
    torch.testing.assert_close(logits_of(model, IDS), logits_of(plain, IDS), rtol=1e-5, atol=1e-5)


def unshared(plain: Any) -> Any:
    """The same ALBERT, with weights of their own for each of its two layers."""
    groups = plain.albert.encoder.albert_layer_groups
    config = copy.deepcopy(plain.config)
    config.num_hidden_groups = 2
    model = type(plain)(config).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    for group in model.albert.encoder.albert_layer_groups:
        group.load_state_dict(groups[0].state_dict())
    return model


@pytest.mark.parametrize("family", FAMILIES + OTHERS, ids=lambda family: family.name)
def test_maps_are_those_of_the_plain_model(family: Family, tmp_path: Path) -> None:
    """Against autograd through the plain transformers model, in float64."""
    plain = saved(f"{family.name}ForMaskedLM", tmp_path, **family.config)
    model = ll.load_model(str(tmp_path), device="cpu", dtype="float64")
    plain = (unshared(plain) if family is ALBERT else plain).double()
    assert_same_logits(model, plain)
    asked = {"attn_baseline": "zero", "mlp_baseline": "zero", "block_baseline": "zero"}
    # ModernBERT's first layer has no norm before attention, and sees everything.
    for layer in (0, 1) if family is MODERNBERT else (1,):
        module = plain.get_submodule(family.layers)[layer]
        expected = maps_from_zero(plain, module, module.get_submodule(family.out), 4, input_ids=torch.tensor([IDS[:4]]))
        flow = ll.attribute(model, IDS[:4], layers=[layer], tol=1e-5, max_nodes=8192, progress=False, **asked)
        assert (flow.layouts, flow.engines["attn"]) == ((family.layout,), (family.engine,))
        held(f"{family.name}ForMaskedLM", "text", flow, missed(flow, expected, 1e-4))


@each_family
def test_classes_are_explained(family: Family, tmp_path: Path) -> None:
    """The contributions of every layer add up to the change of the classifier's own logit."""
    plain = saved(f"{family.name}ForSequenceClassification", tmp_path, **family.config)
    model = ll.load_model(str(tmp_path), device="cpu")
    assert_same_logits(model, plain)
    change = float((logits_of(plain, IDS) - logits_of(plain, OTHER))[0, 1])
    flow = ll.attribute(model, IDS, corrupted=OTHER, target=ll.class_logit(1), progress=False)
    torch.testing.assert_close(
        (flow.attn.sum((1, 2, 3)) + flow.skip.sum(1)).double(), torch.full((2,), change).double(), rtol=2e-3, atol=1e-5
    )


@each_family
def test_a_body_has_vectors_and_no_metric(family: Family, tmp_path: Path) -> None:
    saved(f"{family.name}Model", tmp_path, **family.config)
    model = ll.load_model(str(tmp_path), device="cpu")
    flow = ll.attribute(model, IDS, layers=[0], progress=False)
    assert flow.maps == ("attn", "mlp", "block")
    assert all(bool(flow.converged[name].all()) for name in flow.maps)
    with pytest.raises(InputError, match=rf"random weights: {family.head}.*saved as {family.name}Model"):
        ll.attribute(model, IDS, corrupted=OTHER, target=ll.logit_difference(9, 17), progress=False)


@each_family
def test_hooks_and_weights_are_what_they_are_called(family: Family, tmp_path: Path) -> None:
    plain = saved(f"{family.name}ForMaskedLM", tmp_path, **family.config)
    model = ll.load_model(str(tmp_path), device="cpu")
    assert sum(weight.numel() for weight in model.parameters()) == sum(weight.numel() for weight in plain.parameters())
    for layer, block in enumerate(ll.describe_boundaries(model)):
        assert (block.layout, block.engine, block.n_heads, block.d_head) == (family.layout, family.engine, 4, 8)
        named = (block.resid_pre, block.hook_z, block.resid_mid, block.resid_post)
        assert named == tuple(
            f"blocks.{layer}.{name}" for name in ("hook_resid_pre", "attn.hook_z", "hook_resid_mid", "hook_resid_post")
        )
    _, cache = model.run_with_cache(torch.tensor([IDS]))
    for layer, block in enumerate(model.blocks):
        here = {name.removeprefix(f"blocks.{layer}."): value[0] for name, value in cache.items()}
        q, k, v, z, pattern = (here[f"attn.hook_{name}"] for name in ("q", "k", "v", "z", "pattern"))
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(torch.einsum("hji,ihd->jhd", pattern, v), z, **close)
        read, attn = here["attn.hook_in"], block.attn
        for made, weight, bias in ((q, attn.W_Q, attn.b_Q), (k, attn.W_K, attn.b_K), (v, attn.W_V, attn.b_V)):
            by_weight = torch.einsum("pm,hmd->phd", read, weight)
            torch.testing.assert_close(by_weight if bias is None else by_weight + bias, made, **close)
        b_O = 0 if attn.b_O is None else attn.b_O
        torch.testing.assert_close(torch.einsum("phd,hdm->pm", z, attn.W_O) + b_O, here["hook_attn_out"], **close)
        torch.testing.assert_close(here["hook_resid_pre"] + here["hook_attn_out"], here["hook_resid_mid"], **close)
        b_out = 0 if block.mlp.b_out is None else block.mlp.b_out
        torch.testing.assert_close(here["mlp.hook_post"] @ block.mlp.W_out + b_out, here["hook_mlp_out"], **close)
        b_in = 0 if block.mlp.b_in is None else block.mlp.b_in
        pre = "mlp.hook_pre_linear" if block.mlp.W_gate is not None else "mlp.hook_pre"
        torch.testing.assert_close(here["mlp.in.hook_in"] @ block.mlp.W_in + b_in, here[pre], **close)
    model.enable_compatibility_mode(
        disable_warnings=True, fold_ln=False
    )  # with processed weights, for those who want them
    torch.testing.assert_close(
        logits_of(model, IDS).log_softmax(-1), logits_of(plain, IDS).log_softmax(-1), rtol=1e-5, atol=1e-5
    )


def test_layers_that_share_weights_go_on_sharing_them(tmp_path: Path) -> None:
    saved("AlbertForMaskedLM", tmp_path, **{**ALBERT.config, "num_hidden_layers": 3})
    loaded = ll.load_model(str(tmp_path), device="cpu")
    for model in (loaded, copy.deepcopy(loaded), copy.deepcopy(loaded).to(torch.bfloat16)):
        for path in ("attn.q", "attn.o", "ln1", "ln2", "mlp.in", "mlp.out"):
            assert len({id(block.get_submodule(path).weight) for block in model.blocks}) == 1, path
        assert model.embed.weight is model.unembed.original_component.weight
    assert loaded.original_model.config.num_hidden_groups == 1  # as it was saved


@pytest.mark.parametrize("ends", [{}, {"bos_token": "[CLS]", "eos_token": "[SEP]"}], ids=["cls", "bos"])
@pytest.mark.parametrize("kind", ["BertForMaskedLM", "RobertaForMaskedLM", "ModernBertForSequenceClassification"])
def test_texts_begin_and_end_as_in_transformers(kind: str, ends: dict[str, str], tmp_path: Path) -> None:
    """TransformerLens would take off [CLS] and [SEP], or the latter alone where it is the end-of-text token."""
    saved(kind, tmp_path, **(MODERNBERT.config if "Modern" in kind else SMALL))
    tokenizer = tiny_tokenizer("bert")
    tokenizer.add_special_tokens(ends)
    tokenizer.save_pretrained(tmp_path)
    model = ll.load_model(str(tmp_path), device="cpu")
    flow = ll.attribute(model, "w1 w2", layers=[0], maps="block", progress=False)
    assert flow.tokens == ("[CLS]", "w1", "w2", "[SEP]")
    assert model.to_tokens("w1 w2").tolist() == [
        transformers.AutoTokenizer.from_pretrained(tmp_path)("w1 w2").input_ids
    ]


def test_a_copy_has_weights_of_its_own(tmp_path: Path) -> None:
    """Parts of fused maps look at the weights of the map that they are part of, in copies too."""
    saved("ModernBertForMaskedLM", tmp_path, **MODERNBERT.config)
    model = ll.load_model(str(tmp_path), device="cpu")
    other, before = copy.deepcopy(model), logits_of(model, IDS)
    torch.testing.assert_close(logits_of(other, IDS), before)
    other.original_model.model.layers[0].attn.Wqkv.weight.data.mul_(2)
    assert torch.equal(logits_of(model, IDS), before)
    assert not torch.allclose(logits_of(other, IDS), before)
    assert torch.equal(other.blocks[0].attn.W_V, 2 * model.blocks[0].attn.W_V)


VARIANTS = {
    "all layers in two groups": (ALBERT, {"num_hidden_layers": 4, "num_hidden_groups": 2}),
    "groups of two layers": (ALBERT, {"num_hidden_groups": 2, "inner_group_num": 2}),
    "biases": (MODERNBERT, {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "decoder_bias": True}),
    "positions in the input": (DEBERTA, {"position_biased_input": True, "type_vocab_size": 2, "pos_att_type": ["p2c"]}),
    "heads that mix": (DEBERTA, {"talking_head": True}),
    "the newer head": (DEBERTA, {"legacy": False}),
    "no relative positions": (DEBERTA, {"relative_attention": False}),
    "no relative positions, second version": (DEBERTA_V2, {"relative_attention": False}),
    "projections of positions": (DEBERTA_V2, {"share_att_key": False, "position_buckets": -1, "legacy": False}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str, tmp_path: Path) -> None:
    family, config = VARIANTS[name]
    plain = saved(f"{family.name}ForMaskedLM", tmp_path, **{**family.config, **config})
    model = ll.load_model(str(tmp_path), device="cpu")
    assert_same_logits(model, plain)
    engine = "hooks" if config.get("talking_head") else "closed_form"
    assert {boundaries.engine for boundaries in ll.describe_boundaries(model)} == {engine}
    change = logits_of(plain, IDS)[0, -1] - logits_of(plain, OTHER)[0, -1]
    asked = {"corrupted": OTHER, "target": ll.logit_difference(9, 17), "progress": False}
    flow = ll.attribute(model, IDS, layers=[0, len(model.blocks) - 1], **asked)
    found = flow.attn.sum((1, 2, 3)) + flow.skip.sum(1)
    torch.testing.assert_close(found, (change[9] - change[17]).expand(2), rtol=2e-3, atol=1e-5)


RELATIVE_KINDS = {
    "first version": (DEBERTA, {}),
    "second version": (DEBERTA_V2, {}),
    "of queries alone": (DEBERTA, {"pos_att_type": ["c2p"]}),
    "of keys alone": (DEBERTA_V2, {"pos_att_type": ["p2c"]}),
    "with other tokens alone": (DEBERTA_V2, {"pos_att_type": []}),
}


@pytest.mark.parametrize("name", RELATIVE_KINDS)
def test_engines_agree_on_relative_positions(name: str, tmp_path: Path) -> None:
    """On prompts of any length: what was found on one of them serves the others."""
    family, config = RELATIVE_KINDS[name]
    saved(f"{family.name}ForMaskedLM", tmp_path, **{**family.config, **config})
    model = ll.load_model(str(tmp_path), device="cpu")
    for ids, baseline in ((IDS[:4], "zero"), (IDS, "itb"), (IDS, "corrupted"), (IDS[:2], "itb"), (IDS[:1], "zero")):
        flows = both(model, ids, ("attn", "block"), baseline, "l2", layers=1, tol=1e-5)
        for map_name in ("attn", "block"):
            assert difference(flows, map_name) <= 2e-5
    asked = {"corrupted": OTHER, "target": ll.logit_difference(9, 17), "layers": [1], "progress": False}
    flows = [ll.attribute(model, IDS, engine=engine, tol=1e-5, **asked) for engine in ("closed_form", "hooks")]
    assert difference(flows, "attn") <= 2e-5


@pytest.mark.parametrize("family", [DEBERTA, DEBERTA_V2], ids=lambda family: family.name)
def test_other_scores_than_those_of_relative_positions_go_through_hooks(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(f"{family.name}ForMaskedLM", tmp_path, **family.config)
    model = ll.load_model(str(tmp_path), device="cpu")
    part = "att_bias" if family is DEBERTA else "attention_bias"
    for module in model.modules():
        if hasattr(module, f"disentangled_{part}") and not hasattr(module, "original_component"):
            usual = getattr(module, f"disentangled_{part}")
            changed = functools.partial(lambda usual, *inputs: torch.tanh(usual(*inputs)), usual)
            monkeypatch.setattr(module, f"disentangled_{part}", changed)
    assert {found.engine for found in ll.describe_boundaries(model)} == {"hooks"}


def test_a_convolution_belongs_to_the_layer_before_it(tmp_path: Path) -> None:
    """It mixes positions after attention: what heads write there is no token's alone."""
    family = replace(DEBERTA_V2, config={**DEBERTA_V2.config, "conv_kernel_size": 3})
    plain = saved("DebertaV2ForMaskedLM", tmp_path, **family.config)
    model = ll.load_model(str(tmp_path), device="cpu")
    assert_same_logits(model, plain)
    _, cache = model.run_with_cache(torch.tensor([IDS]))
    torch.testing.assert_close(cache["blocks.0.hook_resid_post"], cache["blocks.1.hook_resid_pre"])
    ll.attribute(model, IDS, layers=[0], maps="block", progress=False)
    ll.attribute(model, IDS, layers=[1], progress=False)
    with pytest.raises(BoundaryError, match="Block 0: after attention it mixes positions"):
        ll.attribute(model, IDS, layers=[0], progress=False)


@pytest.mark.parametrize("ending", ["ForMaskedLM", "ForSequenceClassification"])
@each_family
def test_half_precision_computes_in_single(family: Family, ending: str, tmp_path: Path) -> None:
    """Weights that a model looks at outside its blocks (embeddings, relative positions, heads) among them."""
    saved(f"{family.name}{ending}", tmp_path, **family.config)
    model = ll.load_model(str(tmp_path), device="cpu", dtype="bfloat16")
    target = ll.class_logit(1) if "Class" in ending else ll.logit_difference(9, 17)
    asked = {"corrupted": OTHER, "target": target, "layers": [1], "progress": False}
    half = ll.attribute(model, IDS, **asked)
    single = ll.attribute(model.to(torch.float32), IDS, **asked)
    assert float((half.attn - single.attn).abs().max()) <= 0.02 * float(single.attn.abs().max())
