"""Integrands of cross-attention in closed form.

The query rests, and keys and values go in straight lines from those of one output of the encoder to those of another,
so with g the scalar's gradient at z

    c_ji = p_ji [ds_ji (g_j.v_i - g_j.z_j) + g_j.dv_i],    ds_ji = scale q_j.dk_i,

and scores along the path lie between those at its ends.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lig_lens.blocks.across import AcrossValues
from lig_lens.blocks.pairing import per_query_head
from lig_lens.blocks.values import Values
from lig_lens.integrate.integrand import ByPoints, PathIntegrand
from lig_lens.paths.path import ResidPath
from lig_lens.targets.target import DestinationTarget, Scalar


class AcrossIntegrand(ByPoints, PathIntegrand):
    """From the encoder's output to the heads of cross-attention: groups are heads, parts sources."""

    def __init__(
        self,
        values: Values,
        known: AcrossValues,
        start: Float[Tensor, "src d_model"],
        scalar: Scalar,
        dst: Int[Tensor, "dst"],
        size: int,
    ) -> None:
        n_heads = values.heads.n_heads
        super().__init__(values, scalar, dst, n_heads, n_parts=len(values))
        k, v = known.keys_and_values(start)
        first, last = (known.dots(keys)[:, dst] for keys in (k, known.k))
        self.scores, self.rise = first + known.bias[:, dst], last - first
        self.v = [per_query_head(one, n_heads) for one in (v, known.v)]
        self.chunk = max(1, size // (n_heads * len(values)))
        every = torch.arange(len(dst), device=self.device)
        self.start = self._at(every, torch.zeros(len(dst), dtype=self.dtype, device=self.device))[1].transpose(0, 1)

    def _at(self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"]) -> tuple[Tensor, Tensor]:
        """Pattern [head item src] and head outputs [head item d_head]."""
        pattern = torch.addcmul(self.scores[:, dst], a[:, None], self.rise[:, dst]).softmax(-1)
        return pattern, torch.lerp(pattern @ self.v[0], pattern @ self.v[1], a[:, None])

    def _scalars(self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"]) -> Float[Tensor, "item group"]:
        moved = self._at(dst, a)[1].transpose(0, 1) - self.start[dst]
        return self.scalar(moved, self.positions.to(self.device)[dst])

    def _parts(
        self, dst: Int[Tensor, "item"], a: Float[Tensor, "item"], groups: list[int]
    ) -> Float[Tensor, "item group part"]:
        pattern, z = self._at(dst, a)
        moved = (z - self.start[dst].transpose(0, 1))[:, :, None]
        gradient = self.scalar.gradient(moved, self.positions.to(self.device)[dst][None])[:, :, 0]
        first, last = (gradient @ v.mT for v in self.v)
        at_v, at_z = torch.lerp(first, last, a[:, None]), (gradient * z).sum(-1, keepdim=True)
        return (pattern * torch.addcmul(last - first, self.rise[:, dst], at_v - at_z)).transpose(0, 1)


def across_integrand(
    values: Values, known: AcrossValues, path: ResidPath, target: DestinationTarget, dst: Int[Tensor, "dst"], size: int
) -> AcrossIntegrand:
    """Contributions of the encoder's output to head outputs, parts [dst, head, src].

    Args:
        values: of the prompt at the block.
        known: its formula of cross-attention.
        path: of the encoder's output, shared by all destinations.
        target: what is measured.
        dst: positions of the destinations.
        size: numbers in one tensor.
    """
    start = torch.zeros_like(values.resid_pre) if path.start is None else path.start
    with torch.no_grad():
        scalar = target.at_node(len(values.resid_post), values.resid_pre, values.heads.W_O)
        return AcrossIntegrand(values, known, start, scalar, dst, size)
