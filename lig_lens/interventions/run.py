"""One prompt's run, of which any block can be run again with what follows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lig_lens.blocks.known import Blocks, Needs
from lig_lens.blocks.recording import Recording
from lig_lens.blocks.values import Messages, Values
from lig_lens.errors import BoundaryError, InputError
from lig_lens.inputs.inputs import Inputs
from lig_lens.interventions.intervention import Change, Trials
from lig_lens.models.running import leaf_at, replacing, torch_hooks
from lig_lens.models.stack import Forward
from lig_lens.targets.metrics import BatchMetric


@dataclass(frozen=True)
class Run:
    """A run of a model on one prompt. Use it inside `prepared(model, model)`, where it was made.

    Attributes:
        values: of the blocks, by layer.
        forward: the run itself, to be continued from any of them.
    """

    values: Mapping[int, Values]
    forward: Forward

    def measure(
        self,
        metric: BatchMetric,
        layer: int,
        trials: Trials,
        max_batch_tokens: int,
        advance: Callable[[int], object],
    ) -> Float[Tensor, "run"]:
        """The metric of runs that differ from this one at one block, in float64.

        Args:
            metric: of the logits.
            layer: number of the block.
            trials: what is changed there.
            max_batch_tokens: tokens that are run at once.
            advance: told how many runs are done.
        """
        values, found = self.values[layer], [torch.zeros(0, dtype=torch.float64)]
        size = max(1, max_batch_tokens // len(values))
        for first in range(0, trials.count, size):
            numbers = torch.arange(first, min(first + size, trials.count), device=values.resid_pre.device)
            with torch.no_grad():
                changed = self._changed(values, trials.make(numbers), len(numbers))
                found.append(metric(changed).cpu().double())
            advance(len(numbers))
        return torch.cat(found)

    def _changed(self, values: Values, change: Change, count: int) -> Float[Tensor, "run *rest"]:
        """The model's outputs with what is changed at a block."""
        resid = values.resid_pre.expand(count, -1, -1) if change.resid is None else change.resid
        hooks = {} if change.z is None else {values.heads.nodes.z_path: replacing(change.z)}
        pairs = [values.call.entering(resid), *torch_hooks(values.call.modules, hooks)]
        return self.forward.onward(values.layer, resid, pairs)

    def noise(self, metric: BatchMetric) -> float:
        """Change of the metric that rounding alone can cause; 0 where it has no gradient to tell."""
        try:
            sensitivity = metric.sensitivity(self.forward.output)
        except InputError:
            return 0.0
        return 8 * sensitivity * max(values.block.rounding for values in self.values.values())

    def gradients(self, metric: BatchMetric) -> dict[int, Float[Tensor, "pos head d_head"]]:
        """Gradient of the metric at the head outputs of every block, from one backward pass.

        Raises:
            InputError: the metric has no gradient, or none that is finite.
        """
        leaves: dict[int, Tensor] = {}
        # Nothing before the first of the blocks has a gradient to give.
        first = self.values[min(self.values)]
        resid = first.resid_pre[None]
        pairs: list[tuple[nn.Module, Callable[..., object], bool]] = [first.call.entering(resid)]
        for layer, values in self.values.items():
            pairs += torch_hooks(values.call.modules, {values.heads.nodes.z_path: leaf_at(leaves, layer)})
        with torch.enable_grad():
            value = metric.checked(metric(self.forward.onward(first.layer, resid, pairs)))
            wanted = [leaves[layer] for layer in self.values]
            grads = torch.autograd.grad(value.sum(), wanted, materialize_grads=True)
        metric.check_gradient(*grads)
        return {
            layer: grad.reshape(values.heads.z.shape)
            for (layer, values), grad in zip(self.values.items(), grads, strict=True)
        }


class Recorder:
    """Runs a model on prompts, one forward pass each. Make it and use it inside `prepared(model, model)`."""

    def __init__(self, blocks: Blocks, needs: Needs) -> None:
        self._blocks, self._needs = blocks, needs

    def values(self, inputs: Inputs) -> Mapping[int, Values]:
        """Values at the blocks, by layer; what comes after the last of them does not run.

        Raises:
            BoundaryError: a block has no separable heads, or its nodes do not reproduce it.
        """
        return self._record(inputs, whole=False).visited

    def run(self, inputs: Inputs) -> Run:
        """A whole run.

        Raises:
            BoundaryError: a block has no separable heads, or its nodes do not reproduce it.
        """
        recording = self._record(inputs, whole=True)
        return Run(recording.visited, recording.whole)

    def _record(self, inputs: Inputs, whole: bool) -> Recording[Values]:
        recording = self._blocks.record(inputs, self._needs, whole=whole)
        for layer, values in recording.visited.items():
            if values.attention is None:
                raise BoundaryError(
                    f"Block {layer} has no attention with separable heads, so nothing can be patched there: leave the "
                    "layer out."
                )
        return recording


def messages_at(values: Values, otherwise: str) -> Messages:
    """Pattern and values of a block's attention.

    Args:
        values: of a prompt at the block, recorded with `Needs(messages=True)`.
        otherwise: what the message says where they cannot be read.

    Raises:
        InputError: no hook shows them, or head outputs are not their product.
    """
    messages = values.heads.messages
    if messages is None:
        raise InputError(
            f"The pattern and values of block {values.layer} cannot be read, or head outputs are not their product: "
            f"{otherwise}"
        )
    return messages
