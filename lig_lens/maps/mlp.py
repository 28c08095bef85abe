"""The map from heads and skip connection to the next residual stream."""

from jaxtyping import Int
from torch import Tensor

from lig_lens.blocks.values import Values
from lig_lens.integrate.autograd import tail_integral
from lig_lens.integrate.engines import HOOKS
from lig_lens.maps.job import Job
from lig_lens.maps.map import DestinationMap, cells_of
from lig_lens.paths.columns import Columns
from lig_lens.targets.target import of_destinations


class Mlp(DestinationMap):
    """hook_z, skip -> resid_post: contribution of each head, of skip connection and bias, at each destination."""

    name = "mlp"
    engines = (HOOKS,)
    parts = ("skip", "bias")

    def node_shape(self, values: Values, n_pos: int) -> tuple[int, ...]:
        """Shape of the head outputs."""
        return (n_pos, *values.heads.z.shape[1:])

    def columns_of(self, job: Job, index: int, dst: Int[Tensor, "dst"]) -> Columns:
        """Heads [head dst], skip, bias and cells [dst]."""
        place, target = job.place(index), of_destinations(job.target)
        path = job.chosen[self.name].tail_path(place, dst)
        integral = tail_integral(place.values, path, target, dst, job.budget)
        parts = integral.parts[:, 0].T
        cells = {name: value[0] for name, value in cells_of(integral).items()}
        return Columns(parts[:-2], **cells, skip=parts[-2], bias=parts[-1])
