"""Head outputs as at the start of the ITB path (the paper's ATTITBa=0, arXiv 2606.21564)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lig_lens.blocks.formula import FormulaValues
from lig_lens.paths.baseline import Baseline, Place
from lig_lens.paths.path import ResidPath, TailStart


class AttItbA0(Baseline):
    """Heads put out what they do where every position holds the destination's vector; the skip connection stays.

    So skip and bias contribute exactly 0.
    """

    def tail_start(self, place: Place, dst: Int[Tensor, "dst"]) -> TailStart:
        """See the base class."""
        z = place.values.heads.z.clone()
        z[dst] = _z_of_equal_tokens(place, dst)
        return TailStart(z, place.values.resid_pre)


def _z_of_equal_tokens(place: Place, dst: Int[Tensor, "item"]) -> Float[Tensor, "item head d_head"]:
    values = place.values
    formula = values.heads.formula
    if isinstance(formula, FormulaValues):
        # All positions hold the same vector, so whatever the pattern is, z is its value.
        return formula.values()[dst]
    path = ResidPath(values.resid_pre, None)
    with torch.no_grad():
        pieces = [
            values.read_z(path.starts(part))[torch.arange(len(part), device=dst.device), part]
            for part in torch.split(dst, place.chunk)
        ]
    return torch.cat(pieces)
