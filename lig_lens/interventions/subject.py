"""What an intervention or a score is about: a model, prompts of one length, and some of the model's blocks."""

from collections.abc import Sequence
from dataclasses import dataclass

from lig_lens.blocks.known import Blocks, Needs
from lig_lens.choose import Selection, chosen_numbers
from lig_lens.hooked import HookedModel, check_hooked, check_one_stack
from lig_lens.inputs.inputs import Inputs
from lig_lens.inputs.pairs import read_pair
from lig_lens.interventions.run import Recorder
from lig_lens.models.loading import check_evaluating
from lig_lens.models.running import one_at_a_time
from lig_lens.models.stack import stack_of


@dataclass(frozen=True)
class Subject:
    """A model, prompts and blocks.

    Attributes:
        model: that runs.
        prompts: the clean one first; all have the same number of tokens.
        layers: numbers of the blocks, in the order in which they were asked for.
    """

    model: HookedModel
    prompts: tuple[Inputs, ...]
    layers: tuple[int, ...]

    def recorder(self, needs: Needs) -> Recorder:
        """What makes the runs; ask for it, and use it, inside `prepared(model, model)`."""
        return Recorder(Blocks(stack_of(self.model), self.layers), needs)


def read_subject(model: object, prompts: Sequence[object], layers: Selection, prepend_bos: bool | None) -> Subject:
    """Check a model, and read prompts and layers.

    Args:
        model: a hooked model.
        prompts: texts or token ids, the clean one first.
        layers: block numbers, all with None.
        prepend_bos: for texts; the tokenizer's own default with None.

    Raises:
        InputError: not a hooked model, one in train mode with dropout, prompts that cannot be read or differ in their
            length, or layers that do not exist.
    """
    hooked = check_hooked(model)
    check_one_stack(hooked, "An intervention")
    check_evaluating(hooked)
    clean, *others = prompts
    with one_at_a_time(hooked):  # a model's tokenizer has settings that it changes meanwhile
        pairs = [read_pair(hooked, clean, other, prepend_bos) for other in others or [None]]
    read = (pairs[0][0], *(other for _, other in pairs if other is not None))
    return Subject(hooked, read, chosen_numbers("layer", layers, int(hooked.cfg.n_layers)))
