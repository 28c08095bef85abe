"""Agreement of compositions with the directly measured block map."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from lig_lens.arguments import checked
from lig_lens.errors import InputError, optional
from lig_lens.flow.compose import RULES, compose
from lig_lens.flow.data import FlowData
from lig_lens.flow.rules import rule_of
from lig_lens.names import MAPS

if TYPE_CHECKING:
    import pandas

T = TypeVar("T")

SIGNED = tuple(name for name in RULES if rule_of(name).signed)


@dataclass(frozen=True)
class Consistency:
    """How far a composition is from the directly measured block map, column by column.

    Each "layer dst". `l2` is the length of the difference, in the direct map's units; `l2_normalised` the same
    divided by the length of the direct column; `pearson` the correlation over sources. NaN where a column is 0 or
    constant. `layers` are the model's numbers of the layer axis.
    """

    l2: Float[Tensor, "layer dst"]
    l2_normalised: Float[Tensor, "layer dst"]
    pearson: Float[Tensor, "layer dst"]
    labels: dict[str, str]
    layers: tuple[int, ...]

    def means(self) -> dict[str, float]:
        """Mean over layers and destinations, NaN left out."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in ("labels", "layers")]
        return {name: float(getattr(self, name).nanmean()) for name in names}


def consistency(flow: FlowData, direct: FlowData, rule: str) -> Consistency:
    """See `Flow.consistency`."""
    flow.check_square("consistency")
    if direct.block is None:
        raise InputError(f"consistency compares with the block map, and that Flow has {', '.join(direct.maps)}.")
    _check_same_prompt([flow, direct])
    targets = [str(side.settings.get("target")) for side in (flow, direct)]
    if targets[0] != targets[1]:
        raise InputError(
            f"consistency: the Flows have the targets {targets[0]} and {targets[1]}: compare like with like."
        )
    labels = {name: str(flow.settings.get(name)) for name in ("attn_baseline", "mlp_baseline")}
    labels |= {"rule": rule, "block_baseline": str(direct.settings.get("block_baseline"))}
    composed, measured = compose(flow, rule).double(), direct.block.double()
    # In causal models later sources are 0 on both sides, which is no agreement.
    later = torch.arange(len(flow.tokens))[:, None] > torch.tensor(flow.destinations)
    causal = not bool((composed[:, later] != 0).any() | (measured[:, later] != 0).any())
    seen = ~later if causal else torch.ones_like(later)
    difference = torch.linalg.vector_norm(composed - measured, dim=1)
    length = torch.linalg.vector_norm(measured, dim=1)
    x, y = (_centred(side, seen) for side in (composed, measured))
    pearson = (x * y).sum(1) / (x.square().sum(1) * y.square().sum(1)).sqrt()
    return Consistency(difference.float(), (difference / length).float(), pearson.float(), labels, flow.layers)


def _centred(values: Float[Tensor, "layer src dst"], seen: Tensor) -> Float[Tensor, "layer src dst"]:
    mean = (values * seen).sum(1, keepdim=True) / seen.sum(0)
    return torch.where(seen, values - mean, 0.0)


def _check_same_prompt(flows: Sequence[FlowData]) -> None:
    for name in ("tokens", "layers", "destinations", "model_name"):
        if len({getattr(flow, name) for flow in flows}) > 1:
            raise InputError(f"The Flows differ in their {name}: give Flows of one prompt, model and selection.")


@checked
def consistency_table(flows: Sequence[FlowData], rules: Sequence[str] = SIGNED) -> "pandas.DataFrame":
    """Compare every composition of some Flows of one prompt with every direct block map among them.

    Args:
        flows: results of `attribute` for one prompt, with the attn, mlp and block maps from different baselines;
            every attn map is put together with every mlp map.
        rules: of composition; by default those whose weights have signs, as a block map has.

    Returns:
        one row for each attn baseline, mlp baseline, rule and block baseline, with the means over layers and
        destinations of `l2`, `l2_normalised` and `pearson` (see `Consistency`).

    Raises:
        InputError: Flows of different prompts, or none with one of the maps.
        MissingPackageError: pandas is not installed.
    """
    if not flows:
        raise InputError("consistency_table needs Flows of one prompt: got none.")
    _check_same_prompt(flows)
    for name in MAPS:
        if not any(name in flow.maps for flow in flows):
            raise InputError(f"consistency_table: no Flow has the {name!r} map: ask attribute() for it.")
    rows = []
    for first in (flow for flow in flows if flow.attn is not None):
        for second in (flow for flow in flows if flow.mlp is not None):
            both = _put_together(first, second)
            for rule in rules:
                for direct in (flow for flow in flows if flow.block is not None):
                    found = consistency(both, direct, rule)
                    rows.append(found.labels | found.means())
    frame: pandas.DataFrame = optional("pandas", "consistency_table").DataFrame(rows)
    return frame


def _put_together(first: FlowData, second: FlowData) -> FlowData:
    """The attn map of one Flow and the mlp map of another."""

    def both(group: Callable[[FlowData], Mapping[str, T]]) -> dict[str, T]:
        return {"attn": group(first)["attn"], "mlp": group(second)["mlp"]}

    return dataclasses.replace(
        first,
        mlp=second.mlp,
        skip=second.skip,
        bias=second.bias,
        block=None,
        total=both(lambda flow: flow.total),
        gap=both(lambda flow: flow.gap),
        converged=both(lambda flow: flow.converged),
        engines=both(lambda flow: flow.engines),
        settings=first.settings | {"mlp_baseline": second.settings.get("mlp_baseline")},
    )
