"""A Flow as JSON text, schema `lig_lens.flow` version 1 (docs/flow-json.md)."""

import json
import os

import torch
from torch import Tensor

from lig_lens.files import write_atomic
from lig_lens.flow.data import FlowData
from lig_lens.flow.header import LABELS, header_of
from lig_lens.flow.labels import CELLS


def json_of(flow: FlowData, path: str | os.PathLike[str] | None = None) -> str:
    """All of a Flow; see `Flow.to_json`."""
    document = header_of({name: getattr(flow, name) for name in LABELS})
    document["maps"] = {name: _map_of(flow, name) for name in flow.maps}
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    if path is not None:
        write_atomic(path, (text + "\n").encode())
    return text


def _map_of(flow: FlowData, name: str) -> dict[str, object]:
    axes = flow.axes
    return {
        "tensors": {
            part: {"axes": axes.tensors[part], "values": _nested(getattr(flow, part))} for part in axes.parts[name]
        },
        "cells": {"axes": axes.cells[name], **{group: _nested(getattr(flow, group)[name]) for group in CELLS}},
    }


def _nested(tensor: Tensor) -> object:
    """Nested lists; floats with the nine digits that identify a float32, non-finite ones as None."""
    if tensor.ndim == 0:
        return tensor.item()
    if tensor.ndim > 1:
        return [_nested(row) for row in tensor]
    if tensor.dtype == torch.bool:
        return tensor.tolist()
    finite = torch.isfinite(tensor).tolist()
    return [float(f"{x:.9g}") if ok else None for x, ok in zip(tensor.tolist(), finite, strict=True)]
