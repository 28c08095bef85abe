"""Prompts as users give them are read as they stand, or refused by name: masks, special tokens, unknown words."""

import pytest
import torch
from at_blocks import read_prompt
from tiny_models import tiny_bridge

import lig_lens
from lig_lens.inputs.pairs import read_pairs


@pytest.fixture(scope="module")
def induction():
    return lig_lens.load_model("induction")


@pytest.fixture(scope="module")
def smollm2():
    return lig_lens.load_model("smollm2")


@pytest.fixture(scope="module")
def minilm():
    return lig_lens.load_model("minilm")


@pytest.mark.parametrize(
    "mask",
    [
        [0, 1, 1, 1, 0],
        [[0, 1, 1, 1, 0]],
        [False, True, True, True, False],
        torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]),
        torch.tensor([[0, 1, 1, 1, 0]], dtype=torch.uint8),
    ],
)
def test_masks_of_ones_and_zeros(mask):
    read = read_prompt(tiny_bridge("gpt2"), [5, 12, 30, 7, 22], attention_mask=mask)
    assert read.ids.tolist() == [[12, 30, 7]]


@pytest.mark.parametrize(
    "mask, message",
    [
        ([1, 1, 0, 1, 1], r"hides position 2, between tokens that it keeps"),
        ([1, 5, -2, 1, 1], r"holds 5: attention_mask has 1 \(or True\) for tokens"),
        ([0.0, 0.0, float("-inf"), 0.0, 0.0], r"is one that is added to scores"),
        ([0.0, 0.0, 0.0, -1e9, -1e9], r"is one that is added to scores"),
        ([float("nan")] * 5, r"holds nan"),
        ([0, 0, 0, 0, 0], r"keeps no token"),
        ([1, 1, 1], r"3 entries for 5 token ids"),
        (torch.ones(1, 1, 5, 5), r"shape \[1, 1, 5, 5\], as if it said which token sees which"),
        (torch.ones(5, 5), r"shape \[5, 5\]"),
        (object(), r"of type object"),
        ("11111", r"of type str"),
    ],
)
def test_masks_of_another_convention_are_refused_by_name(mask, message):
    with pytest.raises(lig_lens.InputError, match=message):
        lig_lens.attribute(tiny_bridge("gpt2"), [5, 12, 30, 7, 22], attention_mask=mask, progress=False)


def test_a_mask_holds_for_a_corrupted_prompt_that_is_padded_alike(induction):
    clean, other, mask = [[0, 0, 0, 50, 49]], [[0, 0, 0, 10, 49]], [[0, 0, 1, 1, 1]]
    ((read, second),) = read_pairs(induction, clean, other, mask, None)
    assert read.record() == [0, 50, 49] and second.record() == [0, 10, 49]
    # Given without padding, it is as long as what the mask keeps.
    ((_, second),) = read_pairs(induction, clean, [[0, 10, 49]], mask, None)
    assert second.record() == [0, 10, 49]


def test_a_text_that_begins_with_the_first_token_gets_it_once(smollm2):
    text = "<|im_start|>user\nhi<|im_end|>\n"
    written = smollm2.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert read_prompt(smollm2, text).record() == written
    assert read_prompt(smollm2, text, prepend_bos=True).record() == [written[0], *written]  # as was asked for
    plain = smollm2.tokenizer("hi", add_special_tokens=False)["input_ids"]
    assert read_prompt(smollm2, "hi").record() == [smollm2.tokenizer.bos_token_id, *plain]


def test_an_encoder_keeps_its_first_token(minilm):
    with pytest.raises(lig_lens.InputError, match=r"prepend_bos=False would take '\[CLS\]' off the prompt"):
        read_prompt(minilm, "a cat", prepend_bos=False)
    assert read_prompt(minilm, "a cat").tokens[0] == "[CLS]"


@pytest.mark.parametrize("text", ["zebra", "zebra quagga", "<bos> zebra", "lamp zebra"])
def test_words_that_are_not_known_are_no_first_token(induction, text):
    with pytest.raises(lig_lens.InputError, match=r"'zebra'.*It would read them as '<bos>'"):
        read_prompt(induction, text)
    assert read_prompt(induction, "lamp lake").tokens == ("<bos>", "lamp", "lake")


@pytest.mark.parametrize("value", ["yes", 1, 0, "False"])
def test_prepend_bos_is_true_or_false(induction, value):
    with pytest.raises(lig_lens.InputError, match="is neither True nor False"):
        read_prompt(induction, "lamp lake", prepend_bos=value)


def test_equal_prompts_are_refused(induction):
    text = "lamp lake mouse lamp"
    with pytest.raises(lig_lens.InputError, match="corrupted equals the prompt"):
        lig_lens.attribute(induction, text, maps="attn", attn_baseline="corrupted", corrupted=text, progress=False)
    with pytest.raises(lig_lens.InputError, match="corrupted equals the prompt"):
        lig_lens.patching.patch(induction, text, text, lig_lens.kl_divergence(), progress=False)
    others = [text, "lake lamp mouse lamp"]  # a mean may go over the prompt itself, too
    lig_lens.patching.ablate(induction, text, lig_lens.logit_difference("lake", "mouse"), others, progress=False)


def test_pieces_of_one_character_are_told_apart(smollm2):
    tokens = read_prompt(smollm2, "a 漢 🤗 b").tokens
    assert len(set(tokens)) == len(tokens) and "�" not in "".join(tokens)
    pieces = [token for token in tokens if "[" in token]
    assert all("漢" in piece or "🤗" in piece for piece in pieces) and sum("漢" in piece for piece in pieces) >= 2
    assert [piece.strip()[1:] for piece in pieces if "漢" in piece] == [
        f"[{n}/{k}]" for k in (sum("漢" in piece for piece in pieces),) for n in range(1, k + 1)
    ]


def test_a_mask_is_not_put_on_a_corrupted_prompt_with_other_padding(induction):
    clean, mask = [0, 50, 49, 30], [1, 1, 1, 0]
    with pytest.raises(lig_lens.InputError, match="corrupted has 4 tokens, the prompt 3"):
        read_pairs(induction, clean, [0, 10, 49, 31], mask, None)
    with pytest.raises(lig_lens.InputError, match="corrupted prompt is of type list"):
        read_pairs(induction, clean, ["a"], mask, None)
