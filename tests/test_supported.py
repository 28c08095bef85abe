"""The table of families, in Python, on the command line and in the documentation."""

import pytest
from recorded import PAGE, page

import lig_lens as ll
from lig_lens.cli.main import run


def test_the_page_shows_the_table() -> None:
    """Written anew by tests/recorded.py."""
    assert PAGE.read_text() == page()


def test_rows_are_true() -> None:
    """That the tests of families find each of them is held where they run (`recorded.held`)."""
    rows = {one.family: one for one in ll.supported()}
    assert len(rows) == len(ll.supported()) > 100
    assert all(0 <= one.difference <= 1e-4 and one.tested for one in rows.values())
    assert rows["Qwen3ForCausalLM"].engine == "closed_form" and rows["AfmoeForCausalLM"].engine == "hooks"
    assert {one.takes for one in rows.values()} == {"text", "images", "source and target"}


def test_the_command_lists_and_searches(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "qwen3for"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].split()[0] == "family" and lines[1].split()[0] == "Qwen3ForCausalLM"
    assert run(["models", "nobody"]) == 2 and "No family with 'nobody'" in capsys.readouterr().err
    assert run(["models", "lama"]) == 0 and run(["models", "Llamma"]) == 2
    assert "Did you mean 'Llama'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, family",
    [
        ("gpt_neox", "GPTNeoXForCausalLM"),
        ("GPTNEOX", "GPTNeoXForCausalLM"),
        ("xlm-roberta", "XLMRobertaForMaskedLM"),
        ("deberta-v2", "DebertaV2ForMaskedLM"),
        ("gpt_oss", "GptOssForCausalLM"),
        ("vit_mae", "ViTMAEForPreTraining"),
        ("LlamaForCausalLM", "LlamaForCausalLM"),
    ],
)
def test_classes_and_model_types_are_found(name: str, family: str) -> None:
    assert family in [one.family.split(",")[0] for one in ll.supported(name)]


@pytest.mark.parametrize(
    "name, near",
    [("qwin3", "Qwen3"), ("mistrel", "Mistral"), ("BertForMaskLM", "BertForMaskedLM"), ("dinov3", "Dinov2")],
)
def test_the_nearest_names_are_given(name: str, near: str) -> None:
    with pytest.raises(ll.InputError, match=rf"No family with '{name}' .*Did you mean .*'{near}"):
        ll.supported(name)


@pytest.mark.parametrize("name", ["日本", "--"])
def test_names_without_letters_are_none(name: str) -> None:
    with pytest.raises(ll.InputError, match=f"No family with '{name}' in its name"):
        ll.supported(name)
