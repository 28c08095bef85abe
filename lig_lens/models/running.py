"""Modules run under hooks: read, replaced, cut short, or answered for, and always left as they were."""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lig_lens.errors import BoundaryError
from lig_lens.hooked import HookedModel, lists_of_blocks
from lig_lens.models.precision import HALF, raised

Hook = Callable[[Tensor], Tensor | None]
"""Receives the activation at a node; returns a replacement, or None to leave it."""


class Stop(Exception):  # noqa: N818  (control flow, not an error)
    """Ends a run as soon as the wanted node has been read."""


def submodules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield `(path, submodule)` in registration order, under the names TransformerLens shows.

    A bridge also reaches each component through the wrapped Hugging Face module; that second path is skipped.
    """
    for name, child in module._modules.items():
        if child is None or name.startswith("_original"):
            continue
        yield prefix + name, child
        yield from submodules(child, f"{prefix}{name}.")


def first_tensor(output: Any) -> Tensor:
    """The hidden states in a block's or module's output, which may be a tuple."""
    tensor = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(tensor, Tensor):
        raise BoundaryError(
            f"A block returned {type(tensor).__name__} where a residual tensor was expected: "
            "this architecture is not supported."
        )
    return tensor


def with_first_tensor(output: Any, tensor: Tensor) -> Any:
    """A module's output with other hidden states in it."""
    if isinstance(output, (tuple, list)):
        return type(output)((tensor, *output[1:]))
    return tensor


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An argument with all tensors in it changed, in tuples and lists too."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(item, change) for item in value)
    return value


@contextlib.contextmanager
def module_hooks(pairs: Sequence[tuple[nn.Module, Callable[..., Any], bool]]) -> Iterator[None]:
    """Attach torch hooks `(module, hook, is_pre)` and take every one off again, whatever happens inside."""
    handles = []
    try:
        for module, hook, is_pre in pairs:
            if is_pre:
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def answering(module: nn.Module, output: Any) -> Iterator[None]:
    """Let a module return `output` without running."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = lambda *_args, **_kwargs: output
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


_LOCKS: "weakref.WeakKeyDictionary[Any, threading.RLock]" = weakref.WeakKeyDictionary()
_LOCKS_GUARD = threading.Lock()


@contextlib.contextmanager
def one_at_a_time(model: HookedModel) -> Iterator[None]:
    """Let threads use a model one after the other: hooks and held weights of one are there for all.

    Autocast is off inside: it would integrate in half precision.
    """
    with _LOCKS_GUARD:
        lock = _LOCKS.setdefault(model, threading.RLock())
    kind = torch.device(str(model.cfg.device or "cpu")).type
    with lock, torch.autocast(kind, enabled=False), _attributes_kept(model):
        yield


@contextlib.contextmanager
def _attributes_kept(model: HookedModel) -> Iterator[None]:
    """Put back tensors that modules note of a run: a bridge keeps its last pattern, with all it was computed from."""
    before = [(module, dict(module.__dict__)) for _, module in model.named_modules()]
    try:
        yield
    finally:
        for module, kept in before:
            for name, value in list(module.__dict__.items()):
                if value is kept.get(name) or not isinstance(value, Tensor):  # asked in the order of their cost
                    continue
                if name in kept:
                    module.__dict__[name] = kept[name]
                else:
                    del module.__dict__[name]


@contextlib.contextmanager
def prepared(model: HookedModel, module: nn.Module | HookedModel) -> Iterator[None]:
    """Hold a block, or all of the model, ready for integration: weights frozen, half precision raised to float32.

    The integrand is evaluated in float32 at least, because differences of half-precision outputs are mostly
    rounding. Of a whole model blocks are raised as they run, so that its weights are not held twice. The original
    parameters are put back untouched on the way out.
    """
    parameters = list(module.parameters()) + list(module.buffers())
    saved = [(p, p.data, p.requires_grad) for p in parameters]
    cfg, dtype = model.cfg, model.cfg.dtype
    whole = id(module) == id(model)
    try:
        for p in parameters:
            if p.dtype in HALF and not whole:
                p.data = p.data.float()
            if p.is_floating_point():
                p.requires_grad_(False)
        if dtype in HALF:
            cfg.dtype = torch.float32
        blocks = [block for blocks in lists_of_blocks(model).values() for block in blocks]
        with raised(cast(nn.Module, model), blocks) if whole else contextlib.nullcontext():
            yield
    finally:
        for p, data, requires_grad in saved:
            p.data = data
            if data.is_floating_point():
                p.requires_grad_(requires_grad)
        cfg.dtype = dtype


def torch_hooks(
    modules: Mapping[str, nn.Module], hooks: Mapping[str, Hook]
) -> list[tuple[nn.Module, Callable[..., Any], bool]]:
    """Hooks on the outputs of a block's submodules, as `module_hooks` takes them."""
    return [(modules[path], functools.partial(_on_output, hook), False) for path, hook in hooks.items()]


def _on_output(hook: Hook, _module: nn.Module, _inputs: Any, output: Any) -> Any:
    replacement = hook(first_tensor(output))
    return None if replacement is None else with_first_tensor(output, replacement)


def leaf_at(leaves: dict[Any, Tensor], key: Any) -> Callable[[Tensor], Tensor]:
    """A hook that lets gradients be asked at an activation, of what it puts under `key`.

    Some bridges hand over views, on which no gradients are kept: a zero that is added to them has one.
    """

    def hook(value: Tensor) -> Tensor:
        leaves[key] = torch.zeros_like(value, requires_grad=True)
        return value + leaves[key]

    return hook


def replacing(value: Tensor) -> Callable[[Tensor], Tensor]:
    """A hook that puts something in an activation's place, in its shape and dtype."""
    return lambda now: value.to(now).reshape(now.shape).contiguous()


def stop(*_: Any) -> None:
    """A hook that ends the run."""
    raise Stop
