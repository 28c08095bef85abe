"""What interventions and gradient scores need of one prompt's run, block by block."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.blocks.call import BlockCall, Hook, module_hooks, torch_hooks
from lig_lens.blocks.find import BlockNodes, find_nodes
from lig_lens.blocks.messages import Attention, attention_of
from lig_lens.blocks.recording import record_calls
from lig_lens.errors import BoundaryError, InputError
from lig_lens.inputs.prompts import Prompt, is_batch
from lig_lens.inputs.request import read_prompts
from lig_lens.models.stack import Rest
from lig_lens.targets.metrics import BatchMetric


def read_pair(model: Any, clean: Any, other: Any, prepend_bos: bool | None) -> tuple[Prompt, Prompt | None]:
    """A prompt, and another of as many tokens if there is one.

    Raises:
        InputError: several prompts, prompts of different lengths, or what cannot be read.
    """
    if is_batch(clean) or is_batch(other):
        raise InputError("A list of prompts: give one pair at a time, and average() the results.")
    return read_prompts(model, clean, other, None, prepend_bos)[0]


@dataclass(frozen=True)
class BlockRun:
    """One block in a run: its nodes, and its attention if the hooks show it."""

    nodes: BlockNodes
    attention: Attention | None


class CircuitRun:
    """A run of a model on one prompt, of which any block can be run again with what follows.

    Make it and use it inside `prepared(model, model)`.
    """

    def __init__(self, model: Any, prompt: Prompt, layers: Sequence[int]) -> None:
        """Run the model and verify the nodes of the blocks.

        Raises:
            BoundaryError: a block has no separable heads, or its nodes do not reproduce it.
        """
        self.model, self.prompt = model, prompt
        self.rest = Rest(model, prompt.ids)
        self.blocks = record_calls(model, prompt.ids, layers, self._visit)

    def _visit(self, call: BlockCall) -> BlockRun:
        seen = call.seen
        nodes = find_nodes(self.model, call, heads=True, formula=False)
        if nodes.z is None:
            raise BoundaryError(
                f"Block {call.layer} has no attention with separable heads, so nothing can be patched there: leave the "
                "layer out."
            )
        assert seen is not None  # float32 at least, see the class's docstring
        return BlockRun(replace(nodes, pattern=None), attention_of(nodes, seen.values))

    def measure(
        self,
        metric: BatchMetric,
        layer: int,
        count: int,
        make: Callable[[Tensor], tuple[Tensor | None, Tensor | None]],
        max_batch_tokens: int,
        advance: Callable[[int], Any],
    ) -> Float[Tensor, "count"]:
        """The metric of `count` runs that differ from this one at what enters one block and at its heads.

        Args:
            metric: of the logits.
            layer: number of the block.
            count: how many runs.
            make: numbers of some runs [run] -> residual vectors that enter the block [run pos d_model] and head
                outputs [run pos head d_head]; None leaves what the block itself makes of the rest.
            max_batch_tokens: tokens that are run at once.
            advance: told how many runs are done.
        """
        nodes = self.blocks[layer].nodes
        assert nodes.z_path is not None
        found = []
        size = max(1, max_batch_tokens // len(self.prompt))
        for first in range(0, count, size):
            part = torch.arange(first, min(first + size, count), device=nodes.resid_pre.device)
            resid, z = make(part)
            if resid is None:
                resid = nodes.resid_pre.expand(len(part), -1, -1)
            hooks: dict[str, Hook] = {} if z is None else {nodes.z_path: _replacing(z)}
            with torch.no_grad():
                found.append(metric(self.rest(nodes.call, resid, hooks)).cpu().double())
            advance(len(part))
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)

    def noise(self, metric: BatchMetric) -> float:
        """Change of the metric that rounding alone can cause; 0 where it has no gradient to tell."""
        try:
            sensitivity = metric.sensitivity(self.rest.logits)
        except InputError:
            return 0.0
        return 8 * sensitivity * max(block.nodes.rounding for block in self.blocks.values())

    def gradients(self, metric: BatchMetric) -> dict[int, Float[Tensor, "pos head d_head"]]:
        """Gradient of the metric at the head outputs of every block, from one backward pass."""
        leaves: dict[int, Tensor] = {}

        def added(layer: int) -> Hook:
            # Some bridges hand over views, on which gradients are not kept: a zero that is added has one.
            def hook(z: Tensor) -> Tensor:
                leaves[layer] = torch.zeros_like(z, requires_grad=True)
                return z + leaves[layer]

            return hook

        pairs = []
        for layer, block in self.blocks.items():
            assert block.nodes.z_path is not None
            pairs += torch_hooks(block.nodes.call.modules, {block.nodes.z_path: added(layer)})
        with torch.enable_grad(), module_hooks(pairs):
            value = metric(self.rest.run())
            grads = torch.autograd.grad(value.sum(), [leaves[layer] for layer in self.blocks], materialize_grads=True)
        result = {}
        for (layer, block), grad in zip(self.blocks.items(), grads, strict=True):
            assert block.nodes.z is not None
            result[layer] = grad.reshape(block.nodes.z.shape)
        return result


def _replacing(z: Tensor) -> Hook:
    return lambda now: z.to(now).reshape(now.shape).contiguous()
