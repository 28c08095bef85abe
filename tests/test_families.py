"""Families of models as checkpoints, loaded as a user would: their logits, their maps, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import VOCAB, tiny_tokenizer

import lig_lens as ll
from lig_lens.errors import InputError

IDS, OTHER = [5, 12, 30, 7, 22, 9], [5, 12, 11, 7, 22, 9]
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
GQA = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def saved(kind: str, folder: Path, seed: int = 0, **config: Any) -> Any:
    """Save a random model of a class of transformers, with weights large enough to matter; gives the plain model."""
    model_class = getattr(transformers, kind)
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**config)).eval()
    for weight in model.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    model.save_pretrained(folder)
    tiny_tokenizer(
        "bert" if "hidden_size" in config and "num_key_value_heads" not in config else "gpt2"
    ).save_pretrained(folder)
    return model


ENCODERS = {
    "RobertaForMaskedLM": SMALL,
    "XLMRobertaForMaskedLM": SMALL,
    "CamembertForMaskedLM": SMALL,
    "ElectraForMaskedLM": {**SMALL, "embedding_size": 16},
}
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


@pytest.mark.parametrize("kind", [*ENCODERS, *CLASSIFIERS])
def test_logits_are_those_of_the_plain_model(kind: str, tmp_path: Path) -> None:
    plain = saved(kind, tmp_path, **{**ENCODERS, **CLASSIFIERS}[kind])
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
