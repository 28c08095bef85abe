"""Find out whether a model's forward pass draws random numbers: then nothing can be said of it as a function."""

import contextlib
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from lig_lens.errors import BoundaryError, InputError

_State = tuple[object, ...]


@contextlib.contextmanager
def no_random_numbers(device: object, run: Callable[[], Tensor]) -> Iterator[None]:
    """Watch what runs inside for random numbers that change its result.

    Generators whose state is the same afterwards were not drawn from, which costs next to nothing to see. Another
    thread may have drawn from them, or what was drawn may not matter: so a suspect runs twice more.

    Args:
        device: that the model is on.
        run: does the same again, and gives its result.

    Raises:
        InputError: it does give something else.
    """
    before = _states(device)
    try:
        yield
    except BoundaryError:  # what is random gives other values when it is run again
        if _states(device) != before:
            _check_same(device, run)
        raise
    if _states(device) != before:
        _check_same(device, run)


def _check_same(device: object, run: Callable[[], Tensor]) -> None:
    devices = [] if not _on_cuda(device) else [torch.device(str(device))]
    kept, outputs = (random.getstate(), np.random.get_state()), []
    with torch.random.fork_rng(devices):
        for seed in (0, 1):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            outputs.append(run())
    random.setstate(kept[0])
    np.random.set_state(kept[1])
    if not torch.equal(*outputs):
        raise InputError(
            "The model draws random numbers in its forward pass, and gives another result each time: call "
            "model.eval(), and take noise, or a router that samples, out of it."
        )


def _states(device: object) -> _State:
    """States of the generators that forward passes draw from: torch's and NumPy's.

    Not Python's: what checks types while testing draws from it, and models only use it while they are trained.
    """
    _, keys, at, *_ = np.random.get_state(legacy=True)
    states: list[object] = [torch.get_rng_state().numpy().tobytes(), keys.tobytes(), at]  # type: ignore[union-attr]
    if _on_cuda(device):
        states.append(torch.cuda.get_rng_state(torch.device(str(device))).numpy().tobytes())
    return tuple(states)


def _on_cuda(device: object) -> bool:
    return str(device).startswith("cuda")
