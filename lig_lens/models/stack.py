"""The model from one block on: residual vectors in, logits out."""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lig_lens.blocks.call import BlockCall, Hook, answering, first_tensor, module_hooks, torch_hooks, with_first_tensor


class Rest:
    """Runs the model from a block on, on one prompt, for several residual streams at once.

    The blocks before do not run: they hand over something of the right kind, and the block gets other residual
    vectors. Whatever the model does around its blocks (masks, position embeddings, final norm, unembedding) it does
    itself. Call it inside `prepared(model, model)`.
    """

    def __init__(self, model: Any, ids: Int[Tensor, "1 pos"]) -> None:
        """Run the model once, for what its blocks hand over and for its `logits` on the prompt."""
        self.model, self.ids = model, ids
        self._usual: list[Any] = []
        pairs = [(block, lambda *seen: self._usual.append(seen[-1]), False) for block in model.blocks]
        with torch.no_grad(), module_hooks(pairs):
            self.logits = self.run()

    def run(self, batch: int = 1) -> Float[Tensor, "batch *rest"]:
        """Logits of the whole model on the prompt, under whatever hooks are on it."""
        logits: Tensor = first_tensor(self.model(self.ids.expand(batch, -1)))
        return logits

    def __call__(
        self, call: BlockCall, resid_pre: Float[Tensor, "batch pos d_model"], hooks: Mapping[str, Hook] | None = None
    ) -> Float[Tensor, "batch *rest"]:
        """Logits of runs in which `resid_pre` enters the block of `call`, with `hooks` on that block's submodules."""

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if isinstance(call.resid_key, int):
                return (*args[: call.resid_key], resid_pre, *args[call.resid_key + 1 :]), kwargs
            return args, kwargs | {call.resid_key: resid_pre}

        with contextlib.ExitStack() as stack:
            for block, usual in zip(self.model.blocks[: call.layer], self._usual, strict=False):
                stack.enter_context(answering(block, with_first_tensor(usual, resid_pre)))
            pairs = [(call.block, enter, True), *torch_hooks(call.modules, hooks or {})]
            stack.enter_context(module_hooks(pairs))
            return self.run(len(resid_pre))
