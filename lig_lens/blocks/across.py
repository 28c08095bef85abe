"""Cross-attention as a formula: queries rest, and keys and values follow the encoder's output in straight lines.

With q of the decoder held, `s_ji = scale q_j.k_i + bias_ji` and `z = softmax(s) v`. That keys and values are affine in
what the encoder puts out, and the scale, are found on the model at hand; the bias (T5's, a mask) is read off the
prompt's own pattern.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.blocks.call import BlockCall
from lig_lens.blocks.formula import ALLOWED
from lig_lens.blocks.inside import Inside, by_position, relative
from lig_lens.blocks.pairing import per_query_head, products
from lig_lens.blocks.reading import PATTERN_PATH, QKV_PATHS
from lig_lens.blocks.score import Score
from lig_lens.blocks.score_fit import fit_scale
from lig_lens.models.running import Hook

_NOT_READABLE = "the pattern, queries, keys and values of cross-attention cannot be read"


@dataclass(frozen=True)
class AcrossFormula:
    """What of it belongs to the block: where queries, keys and values are shown, and what scores are scaled by."""

    paths: tuple[str, str, str]
    scale: float

    @property
    def reads(self) -> tuple[str, ...]:
        """Hooks that have to be read for a prompt's values."""
        return (*self.paths, PATTERN_PATH)

    def on(
        self, call: BlockCall, values: Mapping[str, Tensor], z: Float[Tensor, "dst head d_head"]
    ) -> "AcrossValues | None":
        """The formula with a prompt's values, or None where it does not give its head outputs.

        Args:
            call: the block on the prompt.
            values: what its hooks showed, without a batch axis.
            z: head outputs.
        """
        heads, pattern = _heads(self.paths, values, z), values.get(PATTERN_PATH)
        if heads is None or pattern is None:
            return None
        q, k, v = heads
        if pattern.shape != (*q.shape[:2], k.shape[1]):
            return None
        pattern, dots = pattern.to(z), self.scale * products(None, q, k)
        bias = torch.zeros_like(dots)
        if bool((pattern > 0).all()):
            bias = pattern.log() - dots
        elif not float((dots.softmax(-1) - pattern).abs().max()) <= ALLOWED:
            return None  # what a mask hides cannot be told from what is too small for its dtype
        found = AcrossValues(self, call, q, k, v, bias)
        made = found.pattern(k) @ per_query_head(v, len(q))
        missed = by_position(made.transpose(0, 1).flatten(1) - z.flatten(1), z.flatten(1))
        return found if missed <= ALLOWED else None


@dataclass(frozen=True)
class AcrossValues:
    """The formula with a prompt's values."""

    formula: AcrossFormula
    call: BlockCall = field(repr=False)
    q: Float[Tensor, "head dst d_head"] = field(repr=False)
    k: Float[Tensor, "kv_head src d_head"] = field(repr=False)
    v: Float[Tensor, "kv_head src d_head"] = field(repr=False)
    bias: Float[Tensor, "head dst src"] = field(repr=False)
    """Of the scores, but for a number for each row."""

    def dots(self, k: Float[Tensor, "kv_head src d_head"]) -> Float[Tensor, "head dst src"]:
        """Scores of these keys without their bias."""
        return self.formula.scale * products(None, self.q, k)

    def pattern(self, k: Float[Tensor, "kv_head src d_head"]) -> Float[Tensor, "head dst src"]:
        """The attention pattern of these keys."""
        return (self.dots(k) + self.bias).softmax(-1)

    def keys_and_values(
        self, encoded: Float[Tensor, "src d_model"]
    ) -> tuple[Float[Tensor, "kv_head src d_head"], Float[Tensor, "kv_head src d_head"]]:
        """Those of another output of the encoder."""
        read = _read(self.call, encoded[None], self.formula.paths[1:])
        k, v = (_by_head(read[path][0], self.q.shape[-1]) for path in self.formula.paths[1:])
        return k, v


def find_across(inside: Inside) -> AcrossFormula | str:
    """The formula of cross-attention, or the reason why there is none. Call it inside `prepared`.

    Checked on another output of the encoder, and half way from that to the prompt's.
    """
    paths = next((paths for paths in QKV_PATHS if set(paths) <= set(inside.seen.values)), None)
    if paths is None:
        return _NOT_READABLE
    call, at_end = inside.call, inside.seen.values
    heads, x = _heads(paths, at_end, inside.z), call.resid_pre
    other = 0.5 * x.flip(0) - 0.7 * x.roll(1, 0)
    with torch.no_grad():
        read = _read(call, torch.stack([other, (x + other) / 2]), (*paths[1:], PATTERN_PATH))
        if heads is None or PATTERN_PATH not in read or PATTERN_PATH not in at_end:
            return _NOT_READABLE
        q, k, v = heads
        first, half = ([_by_head(read[path][run], q.shape[-1]) for path in paths[1:]] for run in (0, 1))
        for start, between, end in zip(first, half, (k, v), strict=True):
            if not relative(between - (start + end) / 2, end) <= ALLOWED:
                return "keys or values of cross-attention are not affine in the encoder's output"
        shown = [pattern.to(x) for pattern in (*read[PATTERN_PATH], at_end[PATTERN_PATH])]
        if any(pattern.shape != (*q.shape[:2], k.shape[1]) for pattern in shown):
            return _NOT_READABLE
        dots = torch.stack([products(None, q, keys) for keys in (first[0], k)])
        usual = Score(q.shape[-1] ** -0.5)
        formula = AcrossFormula(paths, fit_scale(usual, dots, torch.stack([shown[0], shown[2]]))[0].scale)
        found = formula.on(call, at_end, inside.z)
        if found is None:
            return "head outputs of cross-attention are not pattern times values"
        for keys, pattern in ((first[0], shown[0]), (half[0], shown[1])):
            if not float((found.pattern(keys) - pattern).abs().max()) <= ALLOWED:
                return "the pattern of cross-attention is not a softmax of scaled q.k plus a fixed bias"
    return formula


def _read(call: BlockCall, encoded: Float[Tensor, "run src d_model"], paths: tuple[str, ...]) -> dict[str, Tensor]:
    """What hooks of attention show in runs with other outputs of the encoder."""
    found: dict[str, Tensor] = {}

    def keep(path: str, value: Tensor) -> None:
        found.setdefault(path, value.detach().clone())

    hooks: dict[str, Hook] = {path: functools.partial(keep, path) for path in paths if path in call.modules}
    call.read(encoded, hooks, stop_at="attn")
    return found


def _heads(
    paths: tuple[str, str, str], values: Mapping[str, Tensor], z: Float[Tensor, "dst head d_head"]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Queries, keys and values of one run head by head, or None where hooks do not show them."""
    shown, d_head = [values[path] for path in paths if path in values], z.shape[-1]
    if len(shown) < len(paths) or any(value.numel() % (len(value) * d_head) for value in shown):
        return None
    q, k, v = (_by_head(value, d_head) for value in shown)
    fitting = q.shape[:2] == z.shape[1::-1] and k.shape == v.shape and len(q) % len(k) == 0
    return (q, k, v) if fitting else None


def _by_head(value: Tensor, d_head: int) -> Float[Tensor, "head pos d_head"]:
    """What a hook shows of one run, head by head."""
    return value.reshape(len(value), -1, d_head).transpose(0, 1).contiguous()
