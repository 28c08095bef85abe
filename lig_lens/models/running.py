"""Run one block from given node values.

A full forward pass shows how the model calls each block (attention mask, position embeddings, ...). The call
is kept and replayed with other residual vectors in place of the recorded ones, and with hooks that read or
replace the nodes inside. This is exact, needs no knowledge of the architecture, runs no earlier block, and
works alike on a `TransformerBridge`, a `HookedTransformer` and a `HookedEncoder`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lig_lens.errors import BoundaryError

Hook = Callable[[Tensor], Tensor | None]
"""Receives the activation at a node; returns a replacement, or None to leave it."""


HALF = (torch.float16, torch.bfloat16)

# Hooks that are large, and show no node of a block.
_NOT_READ = ("hook_attn_scores", "hook_rot_q", "hook_rot_k", "mlp.hook_pre", "mlp.hook_post")


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


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_map_tensors(item, change) for item in value)
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


@contextlib.contextmanager
def prepared(model: Any, module: nn.Module) -> Iterator[None]:
    """Hold a block, or all of the model, ready for integration: weights frozen, half precision raised to float32.

    The integrand is evaluated in float32 at least, because differences of half-precision outputs are mostly
    rounding. The original parameters are put back untouched on the way out.
    """
    parameters = list(module.parameters()) + list(module.buffers())
    saved = [(p, p.data, p.requires_grad) for p in parameters]
    cfg, dtype = model.cfg, model.cfg.dtype
    try:
        for p in parameters:
            if p.dtype in HALF:
                p.data = p.data.float()
            if p.is_floating_point():
                p.requires_grad_(False)
        if dtype in HALF:
            cfg.dtype = torch.float32
        yield
    finally:
        for p, data, requires_grad in saved:
            p.data = data
            if data.is_floating_point():
                p.requires_grad_(requires_grad)
        cfg.dtype = dtype


class Seen:
    """What a block's hooks show in one run (first batch item), in the order in which they fired, and its output."""

    output: Float[Tensor, "pos d_model"]

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.order: list[str] = []

    def hooks(self, modules: Mapping[str, nn.Module]) -> dict[str, Hook]:
        """Hooks that read the nodes among a block's submodules."""
        paths = [p for p in modules if p.split(".")[-1].startswith("hook_") and not p.endswith(_NOT_READ)]
        if "attn.o.hook_in" not in modules and "attn" in modules:
            paths.append("attn")
        return {path: functools.partial(self._note, path) for path in paths}

    def _note(self, path: str, tensor: Tensor) -> None:
        self.order.append(path)
        # Some bridges fire a hook twice; the first value is the one on the path.
        if path not in self.values:
            self.values[path] = tensor[0].detach().clone()


@dataclass(frozen=True)
class BlockCall:
    """How the model called one block on one prompt, ready to be replayed.

    `resid_pre` and `resid_post` are the vectors that entered and left it, shape [pos, d_model], in the dtype
    that integration uses.
    """

    layer: int
    block: nn.Module
    resid_pre: Float[Tensor, "pos d_model"]
    resid_post: Float[Tensor, "pos d_model"]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    resid_key: int | str
    """Where the residual stands in the call: position in `args`, or name in `kwargs`."""
    modules: dict[str, nn.Module] = field(repr=False)
    hook_dict: Mapping[str, nn.Module] = field(repr=False)
    """Hooks of the whole model by all their names."""
    recorded_dtype: torch.dtype = torch.float32
    folded: frozenset[int | str] = frozenset()
    """Arguments whose first axis is batch times something else, items of the batch one after the other."""
    seen: Seen | None = field(default=None, repr=False)
    """What the block's hooks showed in that call; None after a call in half precision."""

    def run(
        self,
        resid_pre: Float[Tensor, "batch pos d_model"],
        hooks: Mapping[str, Hook] | None = None,
        stop_at: str | None = None,
    ) -> Float[Tensor, "batch pos d_model"] | None:
        """Run the block on `resid_pre` with `hooks` on its submodules' outputs.

        Args:
            resid_pre: residual vectors to start from, one batch item per interpolation point.
            hooks: path of a submodule inside the block -> hook on its output (the first one, of a tuple).
            stop_at: path of the last submodule that is needed; the rest of the block does not run.

        Returns:
            resid_post, or None where `stop_at` cut the run short.
        """
        args = [self._adapted(key, value, resid_pre) for key, value in enumerate(self.args)]
        kwargs = {name: self._adapted(name, value, resid_pre) for name, value in self.kwargs.items()}
        if isinstance(self.resid_key, int):
            args[self.resid_key] = resid_pre
        else:
            kwargs[self.resid_key] = resid_pre
        pairs = torch_hooks(self.modules, hooks or {})
        if stop_at is not None:
            pairs.append((self.modules[stop_at], _stop, False))
        with module_hooks(pairs):
            try:
                return first_tensor(self.block(*args, **kwargs))
            except Stop:
                return None

    def _adapted(self, key: int | str, value: Any, resid_pre: Float[Tensor, "batch pos d_model"]) -> Any:
        """An argument for as many items as `resid_pre` has; masks and positions were recorded for one."""
        return _map_tensors(value, functools.partial(_adapt, resid_pre, key in self.folded))


def _adapt(resid_pre: Float[Tensor, "batch pos d_model"], folded: bool, tensor: Tensor) -> Tensor:
    batch = len(resid_pre)
    if tensor.is_floating_point():
        tensor = tensor.to(resid_pre.dtype)
    if batch == 1 or tensor.ndim < 2:
        return tensor
    if folded:
        return tensor.repeat(batch, *[1] * (tensor.ndim - 1))
    # Without copying.
    return tensor.expand(batch, *tensor.shape[1:]) if tensor.shape[0] == 1 else tensor


def torch_hooks(
    modules: Mapping[str, nn.Module], hooks: Mapping[str, Hook]
) -> list[tuple[nn.Module, Callable[..., Any], bool]]:
    """Hooks on the outputs of a block's submodules, as `module_hooks` takes them."""
    return [(modules[path], functools.partial(_on_output, hook), False) for path, hook in hooks.items()]


def _on_output(hook: Hook, _module: nn.Module, _inputs: Any, output: Any) -> Any:
    replacement = hook(first_tensor(output))
    return None if replacement is None else with_first_tensor(output, replacement)


def _stop(*_: Any) -> None:
    raise Stop
