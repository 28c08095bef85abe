"""How the model called one block on one prompt, ready to be run again.

A full forward pass shows how the model calls each block (attention mask, position embeddings, ...). The call is kept
and replayed with other residual vectors in place of the recorded ones, and with hooks that read or replace the nodes
inside. This is exact, needs no knowledge of the architecture, runs no earlier block, and works alike on a
`TransformerBridge`, a `HookedTransformer` and a `HookedEncoder`.
"""

import contextlib
import functools
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lig_lens.errors import BoundaryError
from lig_lens.models.experts import Routes, has_experts, routes_held, routes_seen
from lig_lens.models.running import Hook, Stop, first_tensor, map_tensors, module_hooks, stop, torch_hooks
from lig_lens.models.stack import Stack

# Hooks that are large, and show no node of a block.
_NOT_READ = ("hook_attn_scores", "hook_rot_q", "hook_rot_k", "mlp.hook_pre", "mlp.hook_post")


class Seen:
    """What a block's hooks show in one run (first batch item), in the order in which they fired, and its output."""

    output: Float[Tensor, "pos d_model"]

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.order: list[str] = []

    def hooks(self, modules: Mapping[str, nn.Module], wanted: Iterable[str] | None) -> dict[str, Hook]:
        """Hooks that read a block's submodules: those `wanted`, or all that may be a node."""
        if wanted is None:
            wanted = [p for p in modules if p.split(".")[-1].startswith("hook_") and not p.endswith(_NOT_READ)]
            if "attn.o.hook_in" not in modules and "attn" in modules:
                wanted.append("attn")
        return {path: functools.partial(self._note, path) for path in wanted if path in modules}

    def _note(self, path: str, tensor: Tensor) -> None:
        self.order.append(path)
        # Some bridges fire a hook twice; the first value is the one on the path.
        if path not in self.values:
            # Some blocks flatten items and positions before a norm (OPT): what then has two axes is one item's.
            self.values[path] = (tensor if tensor.ndim == 2 else tensor[0]).detach().clone()


@dataclass(frozen=True)
class BlockCall:
    """How the model called one block on one prompt, ready to be replayed.

    `resid_pre` and `resid_post` are the vectors that entered and left it, shape [pos, d_model], in the dtype
    that integration uses. Where attention looks at another stack (`Stack.crosses`), `resid_pre` is what enters from
    there, of as many positions as that has.
    """

    layer: int
    block: nn.Module
    resid_pre: Float[Tensor, "src d_model"]
    resid_post: Float[Tensor, "pos d_model"]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    resid_key: int | str
    """Where `resid_pre` stands in the call: position in `args`, or name in `kwargs`."""
    modules: dict[str, nn.Module] = field(repr=False)
    stack: Stack = field(repr=False)
    """The blocks that it is one of."""
    recorded_dtype: torch.dtype = torch.float32
    folded: frozenset[int | str] = frozenset()
    """Arguments whose first axis is batch times something else, items of the batch one after the other."""
    routes: Routes = field(default=(), repr=False)
    """The experts that are held along paths, if they are."""
    seen: Seen | None = field(default=None, repr=False)
    """What the block's hooks showed in that call; None after a call in half precision."""

    def run(
        self,
        resid_pre: Float[Tensor, "batch src d_model"],
        hooks: Mapping[str, Hook] | None = None,
        positions: Int[Tensor, "item"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Run the block on `resid_pre`, one batch item per interpolation point; gives resid_post.

        Args:
            resid_pre: residual vectors to start from.
            hooks: path of a submodule inside the block -> hook on its output (the first one, of a tuple).
            positions: at which position of the prompt each vector stands, for experts that are held; those of whole
                prompts by default.

        Raises:
            BoundaryError: it cannot run without the cache that it had in the model.
        """
        args, kwargs = self._arguments(resid_pre)
        try:
            with module_hooks(torch_hooks(self.modules, hooks or {})), self._held(resid_pre, positions):
                return first_tensor(self.block(*args, **kwargs))
        except (AttributeError, NotImplementedError) as error:
            raise BoundaryError(
                f"Block {self.layer} cannot be run alone ({error}): its kind is not supported by this TransformerLens "
                "with this transformers. Try another version of either, or other layers."
            ) from error

    def _held(
        self, resid_pre: Float[Tensor, "batch pos d_model"], positions: Int[Tensor, "item"] | None
    ) -> AbstractContextManager[None]:
        if not self.routes:
            return contextlib.nullcontext()
        if positions is None:
            positions = torch.arange(resid_pre.shape[1], device=resid_pre.device).repeat(len(resid_pre))
        return routes_held(self.modules, self.routes, positions)

    def with_routes(self) -> "BlockCall":
        """The same call, with the experts held that the prompt's own vectors choose.

        Raises:
            BoundaryError: the block has experts, and nobody knows how they are chosen.
        """
        args, kwargs = self._arguments(self.resid_pre[None])
        with torch.no_grad(), routes_seen(self.modules, len(self.resid_pre)) as routes:
            self.block(*args, **kwargs)
        if not routes and has_experts(self.block):
            raise BoundaryError(
                f"Block {self.layer} does not choose its experts by the k largest scores, or takes all of them: leave "
                "out experts='held'."
            )
        return replace(self, routes=tuple(routes))

    def read(self, resid_pre: Float[Tensor, "batch pos d_model"], hooks: Mapping[str, Hook], stop_at: str) -> None:
        """Run the block no further than the submodule `stop_at`, for what `hooks` see. Arguments as in `run`."""
        args, kwargs = self._arguments(resid_pre)
        pairs = [*torch_hooks(self.modules, hooks), (self.modules[stop_at], stop, False)]
        with module_hooks(pairs), contextlib.suppress(Stop):
            self.block(*args, **kwargs)

    def entering(self, resid_pre: Float[Tensor, "batch pos d_model"]) -> tuple[nn.Module, Any, bool]:
        """A torch hook, as `module_hooks` takes it, by which `resid_pre` enters the block whoever calls it."""

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if isinstance(self.resid_key, int):
                return (*args[: self.resid_key], resid_pre, *args[self.resid_key + 1 :]), kwargs
            return args, kwargs | {self.resid_key: resid_pre}

        return self.block, enter, True

    def _arguments(self, resid_pre: Float[Tensor, "batch pos d_model"]) -> tuple[list[Any], dict[str, Any]]:
        args = [self._adapted(key, value, resid_pre) for key, value in enumerate(self.args)]
        kwargs = {name: self._adapted(name, value, resid_pre) for name, value in self.kwargs.items()}
        if isinstance(self.resid_key, int):
            args[self.resid_key] = resid_pre
        else:
            kwargs[self.resid_key] = resid_pre
        return args, kwargs

    def _adapted(self, key: int | str, value: Any, resid_pre: Float[Tensor, "batch pos d_model"]) -> Any:
        """An argument for as many items as `resid_pre` has; masks and positions were recorded for one."""
        return map_tensors(value, functools.partial(_adapt, resid_pre, key in self.folded))


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
