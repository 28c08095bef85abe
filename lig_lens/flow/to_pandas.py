"""A map of a Flow as a table of pandas, one row per contribution."""

from typing import TYPE_CHECKING

import torch

from lig_lens.errors import optional
from lig_lens.flow.data import FlowData

if TYPE_CHECKING:
    import pandas


def dataframe_of(flow: FlowData, map: str = "attn") -> "pandas.DataFrame":
    """Long form of one map; see `Flow.to_dataframe`."""
    terms, shares = flow.columns(map), flow.shares(map)
    pd = optional("pandas", "Flow.to_dataframe")
    numbers = torch.meshgrid(*[torch.arange(size) for size in terms.shape], indexing="ij")
    # Of every row, its number along each axis.
    at = {axis: along.flatten() for axis, along in zip(flow.axes.columns[map], numbers, strict=True)}
    dst = torch.tensor(flow.destinations)[at["dst"]]
    src = at.get("src", dst)
    gap, converged = (
        flow.axes.spread(map, cells).expand_as(terms).flatten().numpy().copy()
        for cells in (flow.gap[map], flow.converged[map])
    )
    part, head = _carriers(flow, map, at)
    frame: pandas.DataFrame = pd.DataFrame(
        {
            "map": map,
            "layer": torch.tensor(flow.layers)[at["layer"]].numpy(),
            "part": part,
            "head": pd.array(head, dtype="Int64"),
            "src": src.numpy(),
            "src_token": [flow.tokens[i] for i in src.tolist()],
            "dst": dst.numpy(),
            "dst_token": [flow.dst_tokens[j] for j in dst.tolist()],
            "contribution": terms.flatten().numpy().copy(),
            "share": shares.flatten().numpy(),
            "gap": gap,
            "converged": converged,
        }
    )
    return frame


def _carriers(flow: FlowData, map: str, at: dict[str, torch.Tensor]) -> tuple[list[str], list[int | None]]:
    """What carries each contribution, and the number of its head where it is one."""
    if map == "block":
        return [map] * len(at["layer"]), [None] * len(at["layer"])
    if map == "attn":
        return ["head"] * len(at["head"]), at["head"].tolist()
    rows, n_heads = at["part"].tolist(), flow.columns(map).shape[1] - 2
    names = ["head"] * n_heads + ["skip", "bias"]
    return [names[row] for row in rows], [row if row < n_heads else None for row in rows]
