"""Prompts with nothing in them, where paths to a prompt start when their user names no second prompt."""

from lig_lens.errors import InputError, check_choice
from lig_lens.hooked import HookedModel
from lig_lens.inputs.image_references import IMAGE_REFERENCES, image_reference
from lig_lens.inputs.inputs import Inputs
from lig_lens.inputs.pixels import Pixels
from lig_lens.inputs.text_references import TEXT_REFERENCES, default_text_reference, replaced_by
from lig_lens.inputs.token_ids import TokenIds

ZERO = "zero"
"""Not a prompt: residual vectors of zeros at every boundary."""
_OF_IMAGES = "blurred"


def reference_of(model: HookedModel, inputs: Inputs, name: str | None) -> tuple[str, Inputs | None]:
    """The prompt that a baseline's name stands for.

    Args:
        model: whose prompt it is.
        inputs: the prompt.
        name: as users give it; None for the usual one of such a prompt.

    Returns:
        the name, and the prompt, None for vectors of zeros.

    Raises:
        InputError: a name that is not for such prompts.
    """
    if isinstance(inputs, TokenIds):
        chosen = name or default_text_reference(model) or ZERO
        check_choice("baseline", chosen, (*TEXT_REFERENCES, ZERO))
        return chosen, None if chosen == ZERO else replaced_by(model, inputs, chosen)
    if isinstance(inputs, Pixels):
        chosen = name or _OF_IMAGES
        check_choice("baseline", chosen, (*IMAGE_REFERENCES.names(), ZERO))
        return chosen, None if chosen == ZERO else image_reference(inputs, chosen)
    raise InputError(f"baseline={name!r}: prompts of this kind need a second prompt as corrupted.")
