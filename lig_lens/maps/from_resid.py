"""Maps from residual vectors: to head outputs, and to the block's output."""

from dataclasses import replace

from jaxtyping import Int
from torch import Tensor

from lig_lens.blocks.values import Values
from lig_lens.integrate.engines import ENGINES
from lig_lens.integrate.integrand import integrate_resid
from lig_lens.maps.job import Job
from lig_lens.maps.map import DestinationMap, cells_of
from lig_lens.paths.baseline import Baseline
from lig_lens.paths.columns import Columns
from lig_lens.targets.target import of_destinations


class _FromResid(DestinationMap):
    engines = ENGINES
    to_heads: bool

    def columns_of(self, job: Job, index: int, dst: Int[Tensor, "dst"]) -> Columns:
        """Contributions [head src dst], or [src dst] where there are no heads."""
        place, target, baseline = job.place(index), of_destinations(job.target), job.chosen[self.name]
        engine = self.engine(job.engine, place.values)

        def solve(start: Baseline, share: float) -> Columns:
            budget = replace(job.budget, tol=job.budget.tol * share)
            path = start.resid_path(place)
            integrand = engine.resid_integrand(place.values, path, target, dst, self.to_heads, budget)
            integral = integrate_resid(integrand, path, dst, budget)
            return Columns(integral.parts.permute(1, 2, 0), **cells_of(integral))  # dst head src -> head src dst

        columns = baseline.refill(solve(baseline, 1.0), solve, place, dst)
        return columns if self.to_heads else columns.one_group()


class Attn(_FromResid):
    """resid_pre -> hook_z: contribution of each source to each head's output at each destination."""

    name = "attn"
    to_heads = True

    def cells_per_destination(self, values: Values) -> int:
        """One for each head."""
        return values.heads.n_heads


class Block(_FromResid):
    """resid_pre -> resid_post: contribution of each source to the block's output at each destination."""

    name = "block"
    to_heads = False
    needs_heads = False
