"""The target that a user's argument stands for."""

from lig_lens.errors import check_choice
from lig_lens.targets import TARGETS
from lig_lens.targets.metrics import metric
from lig_lens.targets.target import Target


def as_target(target: object) -> Target:
    """Return a target from a name, a function of the logits, or a target.

    Raises:
        InputError: none of these.
    """
    if isinstance(target, Target):
        return target
    if callable(target):
        return metric(target)
    found: Target = TARGETS[check_choice("target", target, TARGETS.names())]
    return found
