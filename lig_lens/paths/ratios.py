"""ITB with the self term refilled from a second quantity (arXiv 2606.21564).

ITB leaves c_j = 0. The ratio baselines set ĉ_j = s r with s the sum of the column and r the ratio of self to others in
the second quantity, and scale by 1 / (1 + r): with share = r / (1 + r) the others keep (1 - share) of what they had and
the self term gets share * s.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lig_lens.blocks.values import Values
from lig_lens.errors import InputError
from lig_lens.paths.baseline import Baseline, Place
from lig_lens.paths.columns import Columns
from lig_lens.paths.itb import Itb
from lig_lens.paths.zero import Zero

# Denominators below this leave the self term of a ratio baseline at 0.
_VANISHING = 1e-8


class ItbZeroRatio(Itb):
    """The destination gets the share that it has along the path from zero."""

    def refill(
        self, columns: Columns, solve: Callable[[Baseline, float], Columns], place: Place, dst: Int[Tensor, "dst"]
    ) -> Columns:
        """See the base class."""
        zero = solve(Zero(), 1 / 4)  # its error grows when a share is taken
        share = self_share(zero.contributions, dst)
        # The share of a column takes over the error of the sum that it is a share of.
        return replace(
            columns,
            contributions=refill_self(columns.contributions, share, dst),
            gap=torch.maximum(columns.gap, zero.gap * (1 + share.abs())),
            error=torch.maximum(columns.error, zero.error * (1 + share.abs())),
            nodes=columns.nodes + zero.nodes,
        )


class ItbMapRatio(Itb):
    """The destination gets the share that it has in the attention pattern."""

    def refill(
        self, columns: Columns, solve: Callable[[Baseline, float], Columns], place: Place, dst: Int[Tensor, "dst"]
    ) -> Columns:
        """See the base class."""
        share = self_share(_pattern(place.values).mT[..., dst], dst)
        return replace(columns, contributions=refill_self(columns.contributions, share, dst))

    def check_block(self, values: Values) -> None:
        """See the base class."""
        _pattern(values)


def _pattern(values: Values) -> Float[Tensor, "head dst src"]:
    pattern = values.heads.pattern
    if pattern is None:
        raise InputError(
            f"attn_baseline='itb_map_ratio' needs an attention pattern whose rows add up to 1, which block "
            f"{values.layer} does not show (attn.hook_pattern; a sink may take part of them): use 'itb_zero_ratio', or "
            "load the model with eager attention."
        )
    return pattern


def refill_self(
    contributions: Float[Tensor, "*head src dst"], share: Float[Tensor, "*head dst"], dst: Int[Tensor, "dst"]
) -> Float[Tensor, "*head src dst"]:
    """Give the ITB self term a share of its column and rescale the column to its sum.

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
