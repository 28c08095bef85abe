"""Where a model's blocks are, and how to run it: whole, or from any block on."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from lig_lens.errors import BoundaryError
from lig_lens.hooked import HookedModel
from lig_lens.inputs.inputs import Inputs
from lig_lens.models.running import answering, first_tensor, module_hooks, with_first_tensor


@dataclass(frozen=True)
class Stack:
    """A model's blocks in the order in which they run, and the name that each goes by among the model's hooks."""

    model: HookedModel
    blocks: Sequence[nn.Module] = field(repr=False)
    prefix: str

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def hook_dict(self) -> Mapping[str, nn.Module]:
        """Hooks of the whole model by all their names."""
        return self.model.hook_dict

    def name(self, layer: int) -> str:
        """What a block is called."""
        return f"{self.prefix}.{layer}"

    def run(self, inputs: Inputs, batch: int = 1) -> Float[Tensor, "batch *rest"]:
        """The model's output (logits) for `batch` copies of a prompt, under whatever hooks are on it."""
        output: Tensor = first_tensor(self.model(*inputs.arguments(batch)))
        return output


def stack_of(model: HookedModel) -> Stack:
    """The blocks of a hooked model; of today's models all are in one stack.

    Raises:
        BoundaryError: one module serves several layers, which are told apart by their modules (`load_model` gives
            ALBERT's layers modules of their own, with the same weights).
    """
    blocks = list(model.blocks)[: int(model.cfg.n_layers)]
    if len({id(block) for block in blocks}) < len(blocks):
        raise BoundaryError(
            f"{type(model).__name__} uses one block for several of its {len(blocks)} layers, which is not supported: "
            "give each layer a copy of it (copy.deepcopy)."
        )
    return Stack(model, blocks, "blocks")


@dataclass(frozen=True)
class Forward:
    """A run of a model on a prompt, which can be continued from any block with other residual vectors.

    Attributes:
        stack: the model's blocks.
        inputs: the prompt.
        output: what the model gave, [1, ...].
        usual: what each block handed over.
    """

    stack: Stack
    inputs: Inputs
    output: Float[Tensor, "1 *rest"]
    usual: Sequence[Any] = field(repr=False)

    def onward(
        self, layer: int, resid_pre: Float[Tensor, "batch pos d_model"], pairs: Sequence[tuple[nn.Module, Any, bool]]
    ) -> Float[Tensor, "batch *rest"]:
        """Outputs of runs in which block `layer` gets `resid_pre`.

        The blocks before do not run: they hand over something of the right kind. Whatever the model does around its
        blocks (masks, position embeddings, final norm, unembedding) it does itself. Call it in the state of the model
        (`prepared`) in which this run was made.

        Args:
            layer: number of the block.
            resid_pre: residual vectors, one batch item per run.
            pairs: torch hooks, as `module_hooks` takes them, among them one that puts `resid_pre` into the block.
        """
        with contextlib.ExitStack() as stack:
            for block, usual in zip(self.stack.blocks[:layer], self.usual, strict=False):
                stack.enter_context(answering(block, with_first_tensor(usual, resid_pre)))
            stack.enter_context(module_hooks(pairs))
            return self.stack.run(self.inputs, len(resid_pre))
