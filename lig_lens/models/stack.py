"""Where a model's blocks are, and how to run it: whole, or from any block on."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from lig_lens.errors import BoundaryError, InputError, check_choice
from lig_lens.hooked import ONE_STACK, TWO_STACKS, HookedModel, has_two_stacks, lists_of_blocks
from lig_lens.inputs.inputs import Inputs
from lig_lens.models.running import answering, first_tensor, module_hooks, submodules, with_first_tensor
from lig_lens.names import STREAMS

# What the attention that is asked about is called among the parts of a block, whatever its model calls it.
ATTENTION = "attn"


@dataclass(frozen=True)
class Stack:
    """A model's blocks in the order in which they run, and the attention in them that is asked about.

    Attributes:
        model: whose they are.
        blocks: the blocks.
        prefix: name that they go by among the model's hooks.
        attention: submodule of each block that is the attention asked about.
        stream: which of the model's streams this is, None where it has one.
        crosses: whether attention's sources are those of another stack: what moves is the encoder's output, which
            every block gets beside its residual vectors.
        before: blocks of another stack that run before these, whatever happens here.
        behind: blocks of another stack that run after these, on what they put out.
    """

    model: HookedModel
    blocks: Sequence[nn.Module] = field(repr=False)
    prefix: str
    attention: str = ATTENTION
    stream: str | None = None
    crosses: bool = False
    before: Sequence[nn.Module] = field(default=(), repr=False)
    behind: Sequence[nn.Module] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.blocks)

    def count_from(self, layer: int) -> int:
        """How many blocks a run passes from one of these on."""
        return len(self.blocks) - layer + len(self.behind)

    @property
    def hook_dict(self) -> Mapping[str, nn.Module]:
        """Hooks of the whole model by all their names."""
        return self.model.hook_dict

    def name(self, layer: int) -> str:
        """What a block is called."""
        return f"{self.prefix}.{layer}"

    def parts(self, layer: int) -> dict[str, nn.Module]:
        """Submodules of a block by path; those of the attention that is asked about begin with `attn`."""
        found = submodules(self.blocks[layer])
        return {_renamed(path, self.attention, ATTENTION): module for path, module in found}

    def hook_name(self, layer: int, part: str) -> str:
        """Full name of a block's part."""
        return f"{self.name(layer)}.{_renamed(part, ATTENTION, self.attention)}"

    def run(self, inputs: Inputs, batch: int = 1) -> Float[Tensor, "batch *rest"]:
        """The model's output (logits) for `batch` copies of a prompt, under whatever hooks are on it."""
        output: Tensor = first_tensor(self.model(*inputs.arguments(batch), **inputs.keywords(batch)))
        return output


def _renamed(path: str, old: str, new: str) -> str:
    """A path with another name for its first module, where that is `old`."""
    first, dot, rest = path.partition(".")
    return f"{new}{dot}{rest}" if first == old else path


# Stream -> its blocks, the attention in them, and whether that looks into the other stack.
_STREAMS = {
    "encoder": (TWO_STACKS[0], "attn", False),
    "decoder": (TWO_STACKS[1], "self_attn", False),
    "cross": (TWO_STACKS[1], "cross_attn", True),
}


def check_stream(model: HookedModel, stream: str | None) -> str | None:
    """The stream that is meant: of models with an encoder and a decoder `decoder` by default, else None.

    Raises:
        InputError: a stream of a model that has one, or an unknown one.
    """
    if has_two_stacks(model):
        return STREAMS[0] if stream is None else check_choice("stream", stream, STREAMS)
    if stream is not None:
        raise InputError(
            f"stream={stream!r}: {type(model).__name__} has one stack of blocks, not an encoder and a decoder: leave "
            "stream out."
        )
    return None


def stack_of(model: HookedModel, stream: str | None = None) -> Stack:
    """The blocks of a hooked model.

    Args:
        model: the model.
        stream: of a model with an encoder and a decoder, whose attention is asked about (see `check_stream`).

    Raises:
        BoundaryError: one module serves several layers, which are told apart by their modules (`load_model` gives
            ALBERT's layers modules of their own, with the same weights).
        InputError: no such stream.
    """
    stream, lists = check_stream(model, stream), lists_of_blocks(model)
    prefix, attention, crosses = (ONE_STACK[0], ATTENTION, False) if stream is None else _STREAMS[stream]
    blocks = list(lists[prefix])
    if stream is None:
        blocks = blocks[: int(model.cfg.n_layers)]
    if len({id(block) for block in blocks}) < len(blocks):
        raise BoundaryError(
            f"{type(model).__name__} uses one block for several of its {len(blocks)} layers, which is not supported: "
            "give each layer a copy of it (copy.deepcopy)."
        )
    if stream is None:
        return Stack(model, blocks, prefix)
    other = list(lists[next(name for name in TWO_STACKS if name != prefix)])
    before, behind = ([], other) if stream == "encoder" else (other, [])
    return Stack(model, blocks, prefix, attention, stream, crosses, before, behind)


@dataclass(frozen=True)
class Forward:
    """A run of a model on a prompt, which can be continued from any block with other residual vectors.

    Attributes:
        stack: the model's blocks.
        inputs: the prompt.
        output: what the model gave, [1, ...].
        usual: what each block handed over.
        before: what each block that runs before the stack's own handed over.
    """

    stack: Stack
    inputs: Inputs
    output: Float[Tensor, "1 *rest"]
    usual: Sequence[Any] = field(repr=False)
    before: Sequence[Any] = field(default=(), repr=False)

    def onward(
        self, layer: int, resid_pre: Float[Tensor, "batch pos d_model"], pairs: Sequence[tuple[nn.Module, Any, bool]]
    ) -> Float[Tensor, "batch *rest"]:
        """Outputs of runs in which block `layer` gets `resid_pre`.

        The blocks before do not run: they hand over something of the right kind, and those of another stack what they
        did. Whatever the model does around its blocks (masks, position embeddings, final norm, unembedding) it does
        itself. Call it in the state of the model (`prepared`) in which this run was made.

        Args:
            layer: number of the block.
            resid_pre: residual vectors, one batch item per run.
            pairs: torch hooks, as `module_hooks` takes them, among them one that puts `resid_pre` into the block.
        """
        with contextlib.ExitStack() as stack:
            for block, usual in zip(self.stack.blocks[:layer], self.usual, strict=False):
                stack.enter_context(answering(block, with_first_tensor(usual, resid_pre)))
            for block, usual in zip(self.stack.before, self.before, strict=True):
                held = first_tensor(usual).expand(len(resid_pre), -1, -1)
                stack.enter_context(answering(block, with_first_tensor(usual, held)))
            stack.enter_context(module_hooks(pairs))
            return self.stack.run(self.inputs, len(resid_pre))
