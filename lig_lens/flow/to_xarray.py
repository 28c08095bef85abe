"""A Flow as a Dataset of xarray, with labelled axes."""

import json
from typing import TYPE_CHECKING

from lig_lens.errors import optional
from lig_lens.flow.data import FlowData
from lig_lens.flow.header import SCHEMA
from lig_lens.flow.labels import CELLS

if TYPE_CHECKING:
    import xarray


def dataset_of(flow: FlowData) -> "xarray.Dataset":
    """Labelled Dataset; see `Flow.to_xarray`."""
    xarray = optional("xarray", "Flow.to_xarray")
    axes, cells = flow.axes.tensors, flow.axes.cells
    variables: dict[str, object] = {
        name: (axes[name], getattr(flow, name).numpy().copy()) for name in axes if getattr(flow, name) is not None
    }
    for group in CELLS:
        for name, value in getattr(flow, group).items():
            variables[f"{name}_{group}"] = (cells[name], value.numpy().copy())
    coords: dict[str, object] = {
        "layer": list(flow.layers),
        "src": list(range(len(flow.tokens))),
        "dst": list(flow.destinations),
        "src_token": ("src", list(flow.tokens)),
        "dst_token": ("dst", [flow.dst_tokens[j] for j in flow.destinations]),
        "src_special": ("src", list(flow.special)),
        "dst_special": ("dst", [flow.dst_special[j] for j in flow.destinations]),
        "layout": ("layer", list(flow.layouts)),
    }
    for name in ("attn", "mlp"):
        if getattr(flow, name) is not None:
            coords["head"] = list(range(getattr(flow, name).shape[1]))
    coords |= {f"{name}_engine": ("layer", list(engine)) for name, engine in flow.engines.items()}
    # netCDF attributes are flat, so the settings travel as one JSON text.
    attrs: dict[str, object] = {"schema": SCHEMA, "model_name": flow.model_name, "settings": json.dumps(flow.settings)}
    if flow.metric is not None:
        attrs["metric"] = flow.metric
    return xarray.Dataset(variables, coords=coords, attrs=attrs)
