"""Checkpoints that are not what they say: each is named, before anything runs, with what to do about it."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import GPT2, GQA, IDS, OTHER, SMALL, saved
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB

import lig_lens as ll
from lig_lens.errors import BridgeWarning, InputError

T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        ll.load_model(str(folder), device="cpu")
    return str(caught.value)


def _changed(folder: Path, **config: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))


@pytest.mark.parametrize(
    "kind, config, changed, weight, held, wanted",
    [
        ("LlamaForCausalLM", GQA, {"hidden_size": 16}, "model.embed_tokens.weight", [VOCAB, 32], [VOCAB, 16]),
        ("LlamaForCausalLM", GQA, {"vocab_size": 50}, "model.embed_tokens.weight", [VOCAB, 32], [50, 32]),
        (
            "BertForMaskedLM", SMALL, {"intermediate_size": 40}, "bert.encoder.layer.0.intermediate.dense.weight",
            [48, 32], [40, 32],
        ),
        ("LlamaForSequenceClassification", GQA, {"num_labels": 3, "id2label": None, "label2id": None}, "score.weight",
         [2, 32], [3, 32]),
    ],
)  # fmt: skip
def test_a_config_that_disagrees_with_the_weights(
    kind: str, config: Any, changed: Any, weight: str, held: list[int], wanted: list[int], tmp_path: Path
) -> None:
    saved(kind, tmp_path, **config)
    _changed(tmp_path, **changed)
    message = refused(tmp_path)
    assert f"disagree: {weight} has shape {held} in its file, and the config makes it {wanted}" in message
    assert message.endswith("Take the config.json that was saved with the weights.")


def test_what_a_config_forbids_is_said_whole(tmp_path: Path) -> None:
    saved("LlamaForCausalLM", tmp_path, **GQA)
    _changed(tmp_path, num_attention_heads=3)
    assert "(32) is not a multiple of the number of attention heads (3)" in refused(tmp_path)


def test_layers_that_a_config_leaves_out_are_warned_of(tmp_path: Path) -> None:
    saved("LlamaForCausalLM", tmp_path, **GQA)
    _changed(tmp_path, num_hidden_layers=1)
    with pytest.warns(BridgeWarning, match=r"more layers than its config says \(model\.layers\.1\..*and 6 more\)") as w:
        ll.load_model(str(tmp_path), device="cpu")
    assert w[0].filename == __file__


@pytest.mark.parametrize(
    "kind, config, lost, place",
    [
        ("LlamaForCausalLM", GQA, "model.norm.weight", "final norm"),
        ("LlamaForCausalLM", GQA, "model.embed_tokens.weight", "embeddings"),
        ("GPT2LMHeadModel", GPT2, "transformer.wte.weight", "embeddings"),  # which unembed, too
        ("GPT2LMHeadModel", GPT2, "transformer.wpe.weight", "embeddings"),
        ("BertForMaskedLM", SMALL, "bert.embeddings.LayerNorm.bias", "embeddings"),
        ("LlamaForCausalLM", GQA, "model.layers.1.input_layernorm.weight", "blocks"),
    ],
)
def test_what_lacks_is_called_what_it_is(kind: str, config: Any, lost: str, place: str, tmp_path: Path) -> None:
    saved(kind, tmp_path, **config)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert f"lacks weights of its {place}: {lost} stands in no file of it" in refused(tmp_path)


@pytest.mark.parametrize("kind, config", [("LlamaForQuestionAnswering", GQA), ("T5ForTokenClassification", T5)])
def test_a_body_under_another_prefix_is_loaded_as_the_message_says(kind: str, config: Any, tmp_path: Path) -> None:
    saved(kind, tmp_path / "whole", **config)
    message = refused(tmp_path / "whole")
    assert f"was saved as {kind}, whose head lig_lens does not serve (served are those of language models" in message
    code = message.partition("save the body by itself, ")[2].partition(", with its tokenizer")[0]
    eval(code, {"transformers": transformers, "folder": tmp_path / "body"})
    body = ll.load_model(str(tmp_path / "body"), device="cpu", dtype="float64")
    plain = getattr(transformers, kind).from_pretrained(tmp_path / "whole", dtype=torch.float64).base_model
    block = (plain.layers if hasattr(plain, "layers") else plain.encoder.block)[1]
    left: list[Any] = []
    for one in (block, body.blocks[1]):
        one.register_forward_hook(lambda _module, _args, output: left.append(output))
    with torch.no_grad():
        plain(torch.tensor([IDS])), body(torch.tensor([IDS]))
    expected, found = (one[0] if isinstance(one, tuple) else one for one in left)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "kind, config",
    [
        ("LlamaForTokenClassification", GQA),
        ("BertForTokenClassification", SMALL),
        ("BertForQuestionAnswering", SMALL),
        ("BertForMultipleChoice", SMALL),
        ("BertForNextSentencePrediction", SMALL),
        ("GPT2ForQuestionAnswering", GPT2),
    ],
)
def test_heads_that_are_not_served(kind: str, config: Any, tmp_path: Path) -> None:
    saved(kind, tmp_path, **config)
    model = ll.load_model(str(tmp_path), device="cpu")
    ll.attribute(model, IDS, maps="attn", layers=[0], progress=False)  # vectors are
    with pytest.raises(InputError, match=rf"saved as {kind}, whose head lig_lens does not serve \(served are those of"):
        ll.attribute(model, IDS, corrupted=OTHER, target=ll.logit_difference(3, 4), progress=False)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_broken_files_are_named(file: str, tmp_path: Path) -> None:
    saved("LlamaForCausalLM", tmp_path, **GQA)
    (tmp_path / file).write_text('{"size": ')
    assert f"its {file} is broken (Expecting value: line 1 column 10 (char 9))" in refused(tmp_path)


def test_other_files_are_not_blamed(tmp_path: Path) -> None:
    saved("LlamaForCausalLM", tmp_path, **GQA)
    (tmp_path / "notes.json").write_text("// mine")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_attention_heads": "four"}))
    said = refused(tmp_path)
    assert "notes.json" not in said and "num_attention_heads" in said


def test_a_whole_checkpoint_is_silent(tmp_path: Path) -> None:
    saved("LlamaForCausalLM", tmp_path, **GQA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ll.load_model(str(tmp_path), device="cpu")
