"""A Flow as JSON text, schema `lig_lens.flow` version 1 (docs/flow-json.md)."""

import os

from lig_lens.flow.data import FlowData
from lig_lens.flow.header import KIND, LABELS, written
from lig_lens.flow.labels import CELLS
from lig_lens.stored import nested, write_json


def json_of(flow: FlowData, path: str | os.PathLike[str] | None = None) -> str:
    """All of a Flow; see `Flow.to_json`."""
    document = KIND.labelled(written({name: getattr(flow, name) for name in LABELS}))
    document["maps"] = {name: _map_of(flow, name) for name in flow.maps}
    return write_json(document, path)


def _map_of(flow: FlowData, name: str) -> dict[str, object]:
    axes = flow.axes
    return {
        "tensors": {
            part: {"axes": axes.tensors[part], "values": nested(getattr(flow, part))} for part in axes.parts[name]
        },
        "cells": {"axes": axes.cells[name], **{group: nested(getattr(flow, group)[name]) for group in CELLS}},
    }
