"""What the hooks of a block's attention show in a run: queries, keys, values and pattern."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.blocks.call import BlockCall
from lig_lens.blocks.head_norm import HeadNorm
from lig_lens.models.running import Hook, Stop

# Where the two generations show queries, keys and values before rotary, and the pattern.
QKV_PATHS = (
    ("attn.q.hook_out", "attn.k.hook_out", "attn.v.hook_out"),
    ("attn.hook_q", "attn.hook_k", "attn.hook_v"),
)
PATTERN_PATH = "attn.hook_pattern"
# Whichever of them a block has show its messages, pattern times values.
MESSAGE_PATHS = (PATTERN_PATH, *(paths[2] for paths in QKV_PATHS))
# Where attention shows latent vectors, and what norms make of them, which becomes queries, or keys and values. Some
# have no latent queries.
LATENT_PATHS = ("attn.kv_a_proj_with_mqa.hook_out", "attn.hook_kv_latent")
LATENT_QUERY_PATHS = ("attn.q_a_proj.hook_out", "attn.hook_q_latent")
_FROM_LATENTS = "attn.kv_b_proj.hook_out"
_QUERY_PATHS = ("attn.q_proj.hook_out", "attn.q_b_proj.hook_out")
# All that a block's attention may be read at.
_READ = {
    *(path for paths in QKV_PATHS for path in paths), PATTERN_PATH,
    *LATENT_PATHS, *LATENT_QUERY_PATHS, _FROM_LATENTS, *_QUERY_PATHS,
}  # fmt: skip


class UnreadableError(Exception):
    """A hook does not show what its name says; becomes a reason, never reaches a user."""


@dataclass(frozen=True)
class Heads:
    """Queries, keys and values as linear maps make them of what the block's norm gives, in one run or in several.

    Where latent vectors are normed on the way, those norms' divisors are taken off, and the latents stand beside: of
    queries, if they have any, and last of keys and values, which then have another number of dimensions than keys.
    """

    q: Float[Tensor, "*run head pos d_head"]
    k: Float[Tensor, "*run kv_head pos d_head"]
    v: Float[Tensor, "*run kv_head pos d_value"]
    latents: tuple[Float[Tensor, "*run 1 pos _"], ...]

    @property
    def all(self) -> tuple[Tensor, ...]:
        """Everything that the linear maps make."""
        return self.q, self.k, self.v, *self.latents

    def run(self, number: int) -> "Heads":
        """One of several runs."""
        return Heads(self.q[number], self.k[number], self.v[number], tuple(one[number] for one in self.latents))


@dataclass(frozen=True)
class SeenAttention(Heads):
    """The same with the pattern."""

    pattern: Float[Tensor, "*run head dst src"]

    def runs(self, some: slice) -> "SeenAttention":
        """Some of several runs."""
        latents = tuple(one[some] for one in self.latents)
        return SeenAttention(self.q[some], self.k[some], self.v[some], latents, self.pattern[some])


class Reader(ABC):
    """Where queries, keys and values are read."""

    @property
    @abstractmethod
    def paths(self) -> tuple[str, ...]:
        """The hooks."""

    @abstractmethod
    def heads(self, values: Mapping[str, Tensor], runs: tuple[int, ...], n_pos: int) -> Heads:
        """They, from hooks whose values start with the axes `runs`, then pos.

        Raises:
            UnreadableError: they are not there, or have other shapes.
        """

    def seen(self, values: Mapping[str, Tensor], runs: tuple[int, ...]) -> SeenAttention:
        """They and the pattern.

        Raises:
            UnreadableError: they are not there, or have other shapes.
        """
        if PATTERN_PATH not in values:
            raise UnreadableError(f"{PATTERN_PATH} does not fire")
        pattern = values[PATTERN_PATH]
        heads = self.heads(values, runs, pattern.shape[-1])
        n_heads, n_pos = heads.q.shape[-3:-1]
        if pattern.shape != (*runs, n_heads, n_pos, n_pos):
            raise UnreadableError(f"{PATTERN_PATH} has shape {list(pattern.shape)} for {n_heads} heads")
        return SeenAttention(heads.q, heads.k, heads.v, heads.latents, pattern.to(heads.q))


@dataclass(frozen=True)
class ByName(Reader):
    """From hooks on queries, keys and values, all of heads of `d_head` dimensions."""

    qkv: tuple[str, str, str]
    d_head: int

    @property
    def paths(self) -> tuple[str, ...]:
        """See the base class."""
        return self.qkv

    def heads(self, values: Mapping[str, Tensor], runs: tuple[int, ...], n_pos: int) -> Heads:
        """See the base class."""
        q, k, v = (_by_head(_shown(values, path, runs, n_pos), path, self.d_head) for path in self.paths)
        if k.shape != v.shape:
            raise UnreadableError(f"{self.paths[1]} shows {k.shape[-3]} heads, {self.paths[2]} {v.shape[-3]}")
        return Heads(q, k, v, ())


@dataclass(frozen=True)
class FromLatents(Reader):
    """Keys and values from a latent vector, and queries from another one, or not.

    A part of the keys, of `n_turning` dimensions, comes from no latent and is the same in all heads; it stands first
    here, and so does that of queries.

    Attributes:
        q_path: where queries are shown.
        n_heads: how many there are.
        d_value: dimensions of a value.
        rank: of the latent of keys and values.
        n_turning: see above.
        latent_queries: whether queries have a latent.
        norms: of the latents in the order of `Heads.latents`; none before they are found, and what they divide by is
            then not taken off.
    """

    q_path: str
    n_heads: int
    d_value: int
    rank: int
    n_turning: int
    latent_queries: bool
    norms: tuple[HeadNorm, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """See the base class."""
        return (self.q_path, _FROM_LATENTS, LATENT_PATHS[0], *(LATENT_QUERY_PATHS[:1] if self.latent_queries else ()))

    def heads(self, values: Mapping[str, Tensor], runs: tuple[int, ...], n_pos: int) -> Heads:
        """See the base class."""
        shown = {path: _shown(values, path, runs, n_pos) for path in self.paths}
        both = shown[LATENT_PATHS[0]][..., None, :, :]
        of_queries = (shown[LATENT_QUERY_PATHS[0]][..., None, :, :],) if self.latent_queries else ()
        latents = (*of_queries, both[..., : self.rank])
        made = _by_head(shown[_FROM_LATENTS], _FROM_LATENTS, shown[_FROM_LATENTS].shape[-1] // self.n_heads)
        n_rest = made.shape[-1] - self.d_value
        q = _by_head(shown[self.q_path], self.q_path, n_rest + self.n_turning).roll(self.n_turning, -1)
        if q.shape[-3] != self.n_heads:
            raise UnreadableError(f"{self.q_path} shows {q.shape[-3]} heads of {self.n_heads}")
        if self.norms:
            made = made * self.norms[-1].divides_by(latents[-1])
            q = q * self.norms[0].divides_by(latents[0]) if self.latent_queries else q
        turning = both[..., self.rank :].expand(*made.shape[:-1], -1)
        k = torch.cat([turning, made[..., :n_rest]], -1)
        return Heads(q, k, made[..., n_rest:].contiguous(), latents)


def reader_of(call: BlockCall, values: Mapping[str, Tensor], z: Float[Tensor, "pos head d_head"]) -> Reader | None:
    """What reads a block's attention, or None where hooks do not show enough of it.

    Args:
        call: the block.
        values: what its hooks showed on the prompt.
        z: head outputs there.
    """
    if PATTERN_PATH not in call.modules:
        return None
    n_heads, d_value = z.shape[1:]
    q_path = next((path for path in reversed(_QUERY_PATHS) if path in values), None)
    if q_path is not None and {*LATENT_PATHS, _FROM_LATENTS} <= set(values):
        rank = values[LATENT_PATHS[1]].shape[-1]
        n_turning = values[LATENT_PATHS[0]].shape[-1] - rank
        return FromLatents(q_path, n_heads, d_value, rank, n_turning, set(LATENT_QUERY_PATHS) <= set(values))
    paths = next((paths for paths in QKV_PATHS if set(paths) <= set(call.modules)), None)
    return None if paths is None else ByName(paths, d_value)


def _shown(values: Mapping[str, Tensor], path: str, runs: tuple[int, ...], n_pos: int) -> Float[Tensor, "*run pos _"]:
    """What a hook shows of each position, as one vector."""
    if path not in values:
        raise UnreadableError(f"{path} does not fire")
    value = values[path]
    if value.shape[: len(runs) + 1] != (*runs, n_pos):
        raise UnreadableError(f"{path} has shape {list(value.shape)}, the pattern is of {n_pos} positions")
    return value.flatten(len(runs) + 1)


def _by_head(value: Float[Tensor, "*run pos _"], path: str, d_head: int) -> Float[Tensor, "*run head pos d_head"]:
    if value.shape[-1] % d_head:
        raise UnreadableError(f"{path} does not show heads of {d_head} dimensions")
    return value.reshape(*value.shape[:-1], -1, d_head).transpose(-3, -2).contiguous()


class AttentionReading:
    """One run of a block on other residual vectors, in which its attention is read."""

    def __init__(self, call: BlockCall, resid: Float[Tensor, "run pos d_model"]) -> None:
        self.call, self.resid = call, resid
        self.values: dict[str, Tensor] = {}

    def hooks(self) -> dict[str, Hook]:
        """Hooks that read attention in a run of the block on `resid`."""
        return {path: functools.partial(self._read, path) for path in _READ if path in self.call.modules}

    def _read(self, path: str, tensor: Tensor) -> None:
        self.values.setdefault(path, tensor.detach().clone())

    def seen(self, reader: Reader) -> SeenAttention:
        """Heads and pattern of all runs; runs attention if no run has been read yet."""
        if not self.values:
            # The end of attention, not of z: some bridges show their pattern only then.
            self.call.read(self.resid, self.hooks(), stop_at="attn")
        return reader.seen(self.values, self.resid.shape[:1])

    def heads(self, reader: Reader) -> Heads:
        """Queries, keys and values of all runs; the block runs no further than to the last."""

        def read(path: str, tensor: Tensor) -> None:
            self._read(path, tensor)
            if set(reader.paths) <= set(self.values):
                raise Stop

        self.call.read(self.resid, {path: functools.partial(read, path) for path in reader.paths}, stop_at="attn")
        return reader.heads(self.values, self.resid.shape[:1], self.resid.shape[1])
