"""Where a path starts."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lig_lens.blocks.find import BlockNodes
from lig_lens.errors import InputError, check_choice
from lig_lens.paths import baselines_of

# Denominators below this leave the self term of a ratio baseline at 0.
_VANISHING = 1e-8


def check_baseline(
    map_name: str, baseline: Any, n_layers: int, node_shape: tuple[int, ...], has_corrupted: bool
) -> "str | Tensor":
    """Return a usable baseline for a map.

    Args:
        map_name: `attn`, `mlp` or `block`.
        baseline: a name, or a tensor of `node_shape`, with a leading axis of `n_layers` if it differs by layer.
        n_layers: number of layers asked for.
        node_shape: [pos, d_model] for attn and block, [pos, head, d_head] for mlp.
        has_corrupted: whether a corrupted prompt was given.

    Raises:
        InputError: unknown name, wrong shape, or `corrupted` without a corrupted prompt.
    """
    if isinstance(baseline, Tensor):
        if tuple(baseline.shape) not in (node_shape, (n_layers, *node_shape)):
            raise InputError(
                f"{map_name}_baseline has shape {list(baseline.shape)}: this prompt needs {list(node_shape)} or, "
                f"one per layer, {[n_layers, *node_shape]}."
            )
        if not bool(torch.isfinite(baseline).all()):
            raise InputError(f"{map_name}_baseline holds NaN or infinite values.")
        return baseline
    name = check_choice(f"{map_name}_baseline", baseline, baselines_of(map_name))
    if name == "corrupted" and not has_corrupted:
        raise InputError(f"{map_name}_baseline='corrupted' needs a second prompt: pass corrupted=... as well.")
    return name


def describe_baseline(baseline: "str | Tensor") -> str:
    """Name of a baseline, as a Flow records it."""
    return baseline if isinstance(baseline, str) else f"tensor{list(baseline.shape)}"


@dataclass(frozen=True)
class ResidPath:
    """Straight path of the residual vectors that enter a block, `x0 + a (x - x0)`; one per destination.

    `start` is shared by all destinations; None stands for ITB (arXiv 2606.21564), where every position starts
    at the destination's own vector.
    """

    end: Float[Tensor, "pos d_model"]
    start: Float[Tensor, "pos d_model"] | None

    def starts(self, dst: Int[Tensor, "item"]) -> Float[Tensor, "item pos d_model"]:
        """Start of each item's path."""
        if self.start is None:
            return self.end[dst][:, None].expand(-1, self.end.shape[0], -1)
        return self.start.expand(len(dst), *self.start.shape)

    def steps(self, dst: Int[Tensor, "item"]) -> Float[Tensor, "item pos d_model"]:
        """`x - x0` of each item's path."""
        return self.end - self.starts(dst)


@dataclass(frozen=True)
class TailPath:
    """Straight path of what the rest of a block sees: head outputs, skip connection, `bias_start` b_O to b_O."""

    z_start: Float[Tensor, "pos head d_head"]
    z_end: Float[Tensor, "pos head d_head"]
    skip_start: Float[Tensor, "pos d_model"]
    skip_end: Float[Tensor, "pos d_model"]
    bias_start: float


def resid_path(nodes: BlockNodes, baseline: "str | Tensor", corrupted: BlockNodes | None, index: int) -> ResidPath:
    """Path of the `attn` or `block` map; ratio baselines start from the ITB path that they refill."""
    end = nodes.resid_pre
    if isinstance(baseline, Tensor):
        return ResidPath(end, _of_layer(baseline, index, end))
    if baseline == "zero":
        return ResidPath(end, torch.zeros_like(end))
    if baseline == "corrupted":
        assert corrupted is not None
        return ResidPath(end, corrupted.resid_pre)
    return ResidPath(end, None)


def tail_path(
    nodes: BlockNodes,
    baseline: "str | Tensor",
    corrupted: BlockNodes | None,
    index: int,
    dst: Int[Tensor, "dst"],
    chunk: int,
) -> TailPath:
    """Path of the `mlp` map; only the positions `dst` are meant to be used."""
    assert nodes.z is not None
    z, skip = nodes.z, nodes.resid_pre
    z_start, skip_start, bias_start = z, skip, 1.0
    if isinstance(baseline, Tensor):
        z_start = _of_layer(baseline, index, z)
    elif baseline == "zero":
        z_start, skip_start, bias_start = torch.zeros_like(z), torch.zeros_like(skip), 0.0
    elif baseline == "corrupted":
        assert corrupted is not None and corrupted.z is not None
        z_start, skip_start = corrupted.z, corrupted.resid_pre
    else:
        z_start = z.clone()
        z_start[dst] = z_at_start(nodes, ResidPath(skip, None), dst, chunk)
    return TailPath(z_start, z, skip_start, skip, bias_start)


def z_at_start(
    nodes: BlockNodes, path: ResidPath, dst: Int[Tensor, "item"], chunk: int
) -> Float[Tensor, "item head d_head"]:
    """Head outputs at each destination with the residual vectors at the start of its path."""
    if path.start is None and nodes.formula is not None:
        # All positions hold the same vector, so whatever the pattern is, z is its value.
        return nodes.formula.values()[dst]
    with torch.no_grad():
        pieces = [
            nodes.read_z(path.starts(part))[torch.arange(len(part), device=dst.device), part]
            for part in torch.split(dst, chunk)
        ]
    return torch.cat(pieces)


def refill_self(
    contributions: Float[Tensor, "*head src dst"],
    share: Float[Tensor, "*head dst"],
    dst: Int[Tensor, "dst"],
) -> Float[Tensor, "*head src dst"]:
    """Give the ITB self term a share of its column and rescale the column to its sum.

    ITB leaves c_j = 0. The ratio baselines set ĉ_j = s r with s the sum of the column and r the ratio of self
    to others in a second quantity, and scale by 1 / (1 + r): with share = r / (1 + r) the others keep
    (1 - share) of what they had and the self term gets share * s.

    Args:
        contributions: ITB contributions, self terms 0.
        share: fraction of each column that is the destination's own, 0 where it is not defined.
        dst: position of each destination.
    """
    total = contributions.sum(-2)
    refilled = contributions * (1 - share).unsqueeze(-2)
    columns = torch.arange(len(dst), device=dst.device)
    refilled[..., dst, columns] = share * total
    return refilled


def self_share(quantity: Float[Tensor, "*head src dst"], dst: Int[Tensor, "dst"]) -> Float[Tensor, "*head dst"]:
    """Share of the destination itself in each column: `zero ratio` of contributions, `map ratio` of patterns.

    0 where the others' sum or the column's sum vanishes (|.| <= 1e-8), which leaves the ITB column as it is.
    """
    columns = torch.arange(len(dst), device=dst.device)
    own = quantity[..., dst, columns]
    total = quantity.sum(-2)
    defined = ((total - own).abs() > _VANISHING) & (total.abs() > _VANISHING)
    return torch.where(defined, own / torch.where(defined, total, torch.ones_like(total)), 0.0)


def _of_layer(baseline: Tensor, index: int, like: Tensor) -> Tensor:
    return (baseline[index] if baseline.ndim > like.ndim else baseline).detach().to(like)
