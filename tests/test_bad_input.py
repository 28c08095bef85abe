"""Every wrong argument is a typed error with the value and the remedy, before anything is computed."""

from typing import Any

import pytest
import torch
from tiny_models import fresh_bridge, tiny_bridge

import lig_lens
from lig_lens.errors import InputError

IDS = [5, 12, 30, 7]


def refused(prompt: Any = IDS, model: Any = None, **options: Any) -> str:
    """The message with which `attribute` refuses; nothing may have been integrated by then."""
    model = tiny_bridge("gpt2") if model is None else model
    with pytest.MonkeyPatch.context() as patch:

        def never(*_: Any, **__: Any) -> None:
            raise AssertionError("work had started")

        patch.setattr("lig_lens.integrate.integrand.PathIntegrand.integrate", never)
        with pytest.raises(InputError) as caught:
            lig_lens.attribute(model, prompt, progress=False, **options)
    return str(caught.value)


@pytest.mark.parametrize("text", ["", "  \n"])
def test_empty_text(text: str) -> None:
    assert refused(text) == f"The prompt is empty: {text!r}. Give a text with at least one word."


@pytest.mark.parametrize("prompt", [[], torch.empty(0, dtype=torch.long), [0, 0, 0]])
def test_no_tokens(prompt: Any) -> None:
    assert refused(prompt) == "The prompt is empty: give at least one token."


def test_more_tokens_than_the_context() -> None:
    text = " ".join(["w3"] * 40)
    for prompt in (text, [5] * 40):
        message = refused(prompt)
        assert "more than the model's context of 32" in message and "nothing is cut silently" in message
    assert refused([5] * 40).startswith("The prompt has 40 tokens")


def test_ids_outside_the_vocabulary() -> None:
    assert "token id 40, outside the vocabulary 0 … 39" in refused([5, 40])
    assert "token id -1" in refused([5, -1])


@pytest.mark.parametrize(
    "prompt, part",
    [
        (torch.tensor([0.5, 1.0]), "dtype torch.float32 and shape [2]: token ids are integers"),
        (torch.ones(2, 3, dtype=torch.long), "shape [2, 3], a batch of 2: pass a list of prompts"),
        (torch.ones(1, 2, 3, dtype=torch.long), "shape [1, 2, 3]: token ids are integers [pos] or [1, pos]"),
        (object(), "of type object: give a text or token ids"),
    ],
)
def test_prompts_of_another_kind(prompt: Any, part: str) -> None:
    assert part in refused(prompt)


def test_layer_and_destination_out_of_range() -> None:
    assert refused(layers=2) == "layer 2 is out of range: this model has 2, numbered 0 to 1."
    assert refused(layers=[0, -3]) == "layer -3 is out of range: this model has 2, numbered 0 to 1."
    assert refused(destinations=[9]) == "destination 9 is out of range: this prompt has 4, numbered 0 to 3."
    assert refused(layers="all") == "layers='all' is not a number or a list of numbers such as [0, 3]."
    assert refused(destinations=[0.7]).startswith("destinations=[0.7] is not a number")
    assert refused(layers=[]).startswith("layers is empty: name at least one")
    assert refused(destinations=[]).startswith("destinations is empty: name at least one")


@pytest.mark.parametrize(
    "options, parts",
    [
        ({"maps": "atn"}, ("Unknown map 'atn'", "'attn', 'mlp', 'block'", "Did you mean 'attn'?")),
        ({"maps": ()}, ("maps is empty", "'attn', 'mlp', 'block'")),
        ({"attn_baseline": "zeros"}, ("attn_baseline 'zeros'", "'itb_map_ratio'", "Did you mean 'zero'?")),
        ({"mlp_baseline": "itb"}, ("mlp_baseline 'itb'", "'zero', 'att_itb_a0', 'corrupted'", "'att_itb_a0'?")),
        ({"block_baseline": "itb_map_ratio"}, ("block_baseline", "Did you mean 'itb_zero_ratio'?")),
        ({"target": "l3"}, ("Unknown target 'l3'", "Did you mean 'l2'?")),
        ({"engine": "hook"}, ("Unknown engine 'hook'", "Did you mean 'hooks'?")),
        ({"tol": 0.0}, ("tol=0.0 is not between 0 and 1",)),
        ({"tol": float("nan")}, ("tol=nan is not between 0 and 1",)),
        ({"max_nodes": 3}, ("max_nodes=3 is too few", "at least 7")),
        ({"max_batch_tokens": 0}, ("max_batch_tokens=0 is too few",)),
    ],
)
def test_unknown_names_and_impossible_numbers(options: dict[str, Any], parts: tuple[str, ...]) -> None:
    message = refused(**options)
    for part in parts:
        assert part in message


def test_baseline_tensors_of_the_wrong_shape() -> None:
    assert refused(attn_baseline=torch.zeros(3, 24)) == (
        "attn_baseline has shape [3, 24]: this prompt needs [4, 24] or, one per layer, [2, 4, 24]."
    )
    assert "mlp_baseline has shape [4, 24]: this prompt needs [4, 3, 8]" in refused(mlp_baseline=torch.zeros(4, 24))
    assert "block_baseline holds NaN" in refused(block_baseline=torch.full((4, 24), float("nan")))
    # The second prompt is longer: found before the first is computed.
    assert "this prompt needs [5, 24]" in refused([IDS, [*IDS, 8]], attn_baseline=torch.zeros(4, 24))


def test_direction_of_the_wrong_shape() -> None:
    assert refused(target=lig_lens.direction(torch.ones(23))) == (
        "direction has shape [1, 23]: this prompt needs [24] or [4, 24] ([d_model] or [pos, d_model])."
    )
    assert "direction has shape [3, 24]" in refused(target=lig_lens.direction(torch.ones(3, 24)))
    assert "direction holds NaN" in refused(target=lig_lens.direction(torch.full((24,), float("nan"))))
    with pytest.raises(
        InputError, match=r"float tensor \[d_model\] or \[pos, d_model\], got torch\.float32 \[2, 2, 2\] on cpu"
    ):
        lig_lens.direction(torch.zeros(2, 2, 2))


def test_corrupted_prompts() -> None:
    assert refused(attn_baseline="corrupted") == (
        "attn_baseline='corrupted' needs a second prompt: pass corrupted=... as well."
    )
    assert refused(corrupted=IDS) == (
        "corrupted is given, but no baseline of the maps attn, mlp, block is 'corrupted': set one, "
        "or leave corrupted out."
    )
    message = refused(attn_baseline="corrupted", corrupted=[5, 12, 31, 8, 9])
    assert "corrupted has 5 tokens, the prompt 4" in message
    assert "They part at position 2: prompt ['w25', 'w2'], corrupted ['w26', 'w3', 'w4']" in message
    several = refused([IDS, IDS], attn_baseline="corrupted", corrupted=[IDS])
    assert several == "corrupted has 1 entries for 2 prompts: give a list with one per prompt."


def test_attention_mask_with_a_text() -> None:
    assert "attention_mask goes with token ids" in refused("w3 w4", attention_mask=[1, 1])


def test_errors_in_a_list_name_the_prompt() -> None:
    assert refused([IDS, [5, 99]]).startswith("Prompt 1 of 2: The prompt holds token id 99")


def test_a_slip_in_a_baseline_that_is_not_used() -> None:
    assert "Unknown mlp_baseline 'zz'" in refused(maps="attn", mlp_baseline="zz")


def test_attention_mask_of_another_length() -> None:
    assert "attention_mask has 3 entries for 4 token ids" in refused(attention_mask=[1, 1, 1])


def test_train_mode_with_dropout() -> None:
    model = fresh_bridge("gpt2").train()
    message = refused(model=model)
    assert "in train mode with dropout" in message and "= 0.1)" in message and "model.eval()" in message


def test_not_a_hooked_model() -> None:
    assert "Linear is not a hooked model (no blocks, cfg, hook_dict)" in refused(model=torch.nn.Linear(2, 2))
