"""Find out whether a model's forward pass draws random numbers: then nothing can be said of it as a function."""

import contextlib
import random
import threading
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from lig_lens.errors import BoundaryError, InputError

_State = tuple[object, ...]
_ONE_CHECK = threading.Lock()


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
    with _ONE_CHECK:  # all models share the generators
        before, outputs = (random.getstate(), np.random.get_state()), []
        on_cuda = [torch.device(str(device))] if _on_cuda(device) else []
        try:
            with torch.random.fork_rng(on_cuda):
                for seed in (0, 1):
                    # Not torch.manual_seed, which seeds devices that are not restored.
                    torch.default_generator.manual_seed(seed)
                    for gpu in on_cuda:
                        with torch.cuda.device(gpu):
                            torch.cuda.manual_seed(seed)
                    random.seed(seed)
                    np.random.seed(seed)
                    outputs.append(run())
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
    one, other = outputs
    if one.shape != other.shape or not bool(((one == other) | (one.isnan() & other.isnan())).all()):
        raise InputError(
            "The model draws random numbers in its forward pass, and gives another result each time: call "
            "model.eval(), and take noise, or a router that samples, out of it."
        )


def _states(device: object) -> _State:
    """States of the generators that forward passes draw from: torch's, on CPU and CUDA, and NumPy's.

    Not Python's: what checks types while testing draws from it, and models only use it while they are trained.
    """
    _, keys, at, *_ = np.random.get_state(legacy=True)
    states: list[object] = [torch.get_rng_state().numpy().tobytes(), keys.tobytes(), at]  # type: ignore[union-attr]
    if _on_cuda(device):
        states.append(torch.cuda.get_rng_state(torch.device(str(device))).numpy().tobytes())
    return tuple(states)


def _on_cuda(device: object) -> bool:
    return str(device).startswith("cuda")
