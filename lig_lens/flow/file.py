"""A Flow on disk and in other people's formats: safetensors, JSON, pandas, xarray."""

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import torch
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from lig_lens.errors import FlowFileError, optional
from lig_lens.files import replacing, write_atomic
from lig_lens.flow.flow import Flow
from lig_lens.flow.labels import AXES, CELL_AXES, cell_axes, tensor_axes

if TYPE_CHECKING:
    import pandas
    import xarray

SCHEMA = "lig_lens.flow"
SCHEMA_VERSION = 1

CELLS = ("total", "gap", "converged")


class FlowHeader(BaseModel):
    """The labels of a Flow, as they stand in the safetensors header and in the JSON export.

    A key that is not known here may have been added within this schema version, and is passed over.
    """

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    schema_name: Literal["lig_lens.flow"]
    schema_version: Literal[1]
    tokens: tuple[str, ...]
    special: tuple[bool, ...]
    layers: tuple[int, ...]
    destinations: tuple[int, ...]
    model_name: str
    settings: dict[str, JsonValue]
    layouts: tuple[str, ...]
    engines: dict[str, tuple[str, ...]]
    metric: str | None = None


_LABELS = tuple(name for name in FlowHeader.model_fields if not name.startswith("schema"))


def save(flow: Flow, path: str | os.PathLike[str]) -> Path:
    """Write `flow` to `path`; see `Flow.save`. The labels are one JSON text in the metadata."""
    tensors = {name: getattr(flow, name) for name in AXES if getattr(flow, name) is not None}
    for group in CELLS:
        tensors |= {f"{group}.{name}": value for name, value in getattr(flow, group).items()}
    # safetensors refuses tensors that share memory, which slices of one result may do.
    tensors = {name: value.clone() for name, value in tensors.items()}
    labels = {name: getattr(flow, name) for name in _LABELS}
    return write_atomic(path, safetensors_bytes(tensors, metadata=_metadata(labels)))


class GrowingFile:
    """A Flow file that is written layer by layer, so that the Flow need not fit into memory.

    Layers are the first axis of every tensor, so each is one stretch of the file. Room is taken at once: a full disk
    shows before anything is computed.
    """

    def __init__(self, stream: BinaryIO, labels: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> None:
        self._stream, self._shapes, self._starts = stream, shapes, {}
        entries: dict[str, Any] = {"__metadata__": _metadata(labels)}
        end = 0
        # safetensors wants large elements first.
        for name in sorted(shapes, key=_dtype, reverse=True):
            start, end = end, end + math.prod(shapes[name]) * (4 if _dtype(name) == "F32" else 1)
            self._starts[name] = start
            entries[name] = {"dtype": _dtype(name), "shape": list(shapes[name]), "data_offsets": [start, end]}
        header = json.dumps(entries, ensure_ascii=False, allow_nan=False).encode()
        header += b" " * (-len(header) % 8)
        self._offset = 8 + len(header)
        stream.write(len(header).to_bytes(8, "little") + header)
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(stream.fileno(), 0, self._offset + end)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # some file systems cannot
                    raise
        stream.truncate(self._offset + end)

    def put(self, name: str, index: int, value: Tensor) -> None:
        """Write layer number `index` of a tensor."""
        if tuple(value.shape) != tuple(self._shapes[name][1:]):
            raise ValueError(f"{name} has layers of shape {self._shapes[name][1:]}, not {list(value.shape)}")
        dtype = torch.float32 if _dtype(name) == "F32" else torch.bool
        data = value.detach().to("cpu", dtype).contiguous().numpy()
        self._stream.seek(self._offset + self._starts[name] + index * data.nbytes)
        self._stream.write(data.data)


@contextlib.contextmanager
def growing(
    path: str | os.PathLike[str], labels: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> Iterator[GrowingFile]:
    """Open a Flow file to be filled; it is there, whole, once this ends without an error.

    Args:
        path: where it goes.
        labels: what a Flow holds beside its tensors, by name.
        shapes: of all its tensors, under the names that they have in the file (`attn`, `gap.attn`).

    Raises:
        InputError: `path` cannot be written.
        OSError: no room for the file.
    """
    with replacing(path) as beside, open(beside, "wb") as stream:
        yield GrowingFile(stream, labels, shapes)
        stream.flush()
        os.fsync(stream.fileno())


def _dtype(name: str) -> str:
    return "BOOL" if name.startswith("converged") else "F32"


def _metadata(labels: Mapping[str, Any]) -> dict[str, str]:
    return {"lig_lens": json.dumps(_header(labels), ensure_ascii=False, allow_nan=False)}


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Labels and tensors of a saved Flow, as arguments for `Flow`; see `Flow.load`."""
    file, shown = Path(path), repr(os.fspath(path))
    if not file.is_file():
        kind = "is a folder, not a Flow file" if file.is_dir() else "does not exist"
        raise FlowFileError(f"{shown} {kind}: give a file that Flow.save wrote.")
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise FlowFileError(
            f"{shown} cannot be read as safetensors ({_brief(error)}): it is damaged or another kind of "
            "file. Give a file that Flow.save wrote."
        ) from error
    if "lig_lens" not in metadata:
        raise FlowFileError(
            f"{shown} is a safetensors file but holds no Flow (no 'lig_lens' in its header): "
            "give one that Flow.save wrote."
        )
    header = _parse_header(metadata["lig_lens"], shown)
    fields = {name: getattr(header, name) for name in _LABELS}
    return fields, _group(tensors, shown)


def _parse_header(text: str, shown: str) -> FlowHeader:
    try:
        raw = json.loads(text)
        version = raw["schema_version"]
        if raw["schema"] != SCHEMA or type(version) is not int:
            raise ValueError(f"schema {raw['schema']!r}, version {version!r}")
        if version > SCHEMA_VERSION:
            raise FlowFileError(
                f"{shown} has Flow schema version {version}, and this lig_lens reads up to {SCHEMA_VERSION}: "
                "update it with pip install --upgrade lig-lens."
            )
        raw["schema_name"] = raw.pop("schema")
        return FlowHeader.model_validate_json(json.dumps(raw))
    except FlowFileError:
        raise
    except (ValidationError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FlowFileError(f"{shown} has a damaged Flow header ({_brief(error)}): save the Flow again.") from error


def _group(tensors: dict[str, Tensor], shown: str) -> dict[str, Any]:
    """`{"attn": ..., "gap.attn": ...}` as `{"attn": ..., "gap": {"attn": ...}}`."""
    grouped: dict[str, Any] = {group: {} for group in CELLS}
    for name, tensor in tensors.items():
        group, _, map_name = name.partition(".")
        expected = torch.bool if group == "converged" else torch.float32
        known = name in AXES or (group in CELLS and map_name in CELL_AXES)
        if not known or tensor.dtype != expected:
            raise FlowFileError(
                f"{shown} holds an unexpected tensor {name!r} ({tensor.dtype}): it is damaged. Save the Flow again."
            )
        if map_name:
            grouped[group][map_name] = tensor
        else:
            grouped[name] = tensor
    return grouped


def _header(labels: Mapping[str, Any]) -> dict[str, Any]:
    # Tuples become lists in JSON.
    return {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **{name: labels[name] for name in _LABELS}}


def to_json(flow: Flow, path: str | os.PathLike[str] | None = None) -> str:
    """JSON text of schema `lig_lens.flow` version 1 (docs/flow-json.md); see `Flow.to_json`."""
    document = _header({name: getattr(flow, name) for name in _LABELS})
    document["maps"] = {}
    axes, cells = tensor_axes(flow.metric is not None), cell_axes(flow.metric is not None)
    for name in flow.maps:
        parts: tuple[str, ...] = ("mlp", "skip", "bias") if name == "mlp" else (name,)
        if flow.metric is not None:
            parts = ("attn", "skip")
        document["maps"][name] = {
            "tensors": {part: {"axes": axes[part], "values": _nested(getattr(flow, part))} for part in parts},
            "cells": {
                "axes": cells[name],
                **{group: _nested(getattr(flow, group)[name]) for group in CELLS},
            },
        }
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    if path is not None:
        write_atomic(path, (text + "\n").encode())
    return text


def _nested(tensor: Tensor) -> Any:
    """Nested lists; floats with the nine digits that identify a float32, non-finite ones as None."""
    if tensor.ndim == 0:
        return tensor.item()
    if tensor.ndim > 1:
        return [_nested(row) for row in tensor]
    if tensor.dtype == torch.bool:
        return tensor.tolist()
    finite = torch.isfinite(tensor).tolist()
    return [float(f"{x:.9g}") if ok else None for x, ok in zip(tensor.tolist(), finite, strict=True)]


def to_dataframe(flow: Flow, map: str = "attn") -> "pandas.DataFrame":
    """Long form of one map; see `Flow.to_dataframe`."""
    terms, shares = flow.columns(map), flow.shares(map)
    pd = optional("pandas", "Flow.to_dataframe")
    grids = torch.meshgrid(*[torch.arange(size) for size in terms.shape], indexing="ij")
    layer, dst = grids[0].flatten(), grids[-1].flatten()
    dst_pos = torch.tensor(flow.destinations)[dst]
    src_pos = grids[-2].flatten() if map != "mlp" else dst_pos
    part, head = _parts(map, terms, grids)
    cell: tuple[Tensor, ...] = (layer, grids[1].flatten(), dst) if map == "attn" else (layer, dst)
    if flow.metric is not None:
        cell = (layer,)
    frame: pandas.DataFrame = pd.DataFrame(
        {
            "map": map,
            "layer": torch.tensor(flow.layers)[layer].numpy(),
            "part": part,
            "head": pd.array(head, dtype="Int64"),
            "src": src_pos.numpy(),
            "src_token": [flow.tokens[i] for i in src_pos.tolist()],
            "dst": dst_pos.numpy(),
            "dst_token": [flow.tokens[j] for j in dst_pos.tolist()],
            "contribution": terms.flatten().numpy().copy(),
            "share": shares.flatten().numpy(),
            "gap": flow.gap[map][cell].numpy(),
            "converged": flow.converged[map][cell].numpy(),
        }
    )
    return frame


def _parts(map: str, terms: Tensor, grids: tuple[Tensor, ...]) -> tuple[list[str], list[int | None]]:
    if map == "block":
        return ["block"] * terms.numel(), [None] * terms.numel()
    rows = grids[1].flatten().tolist()
    if map == "attn":
        return ["head"] * terms.numel(), rows
    n_heads = terms.shape[1] - 2
    names = ["head"] * n_heads + ["skip", "bias"]
    return [names[row] for row in rows], [row if row < n_heads else None for row in rows]


def to_xarray(flow: Flow) -> "xarray.Dataset":
    """Labelled Dataset; see `Flow.to_xarray`."""
    xarray = optional("xarray", "Flow.to_xarray")
    axes, cells = tensor_axes(flow.metric is not None), cell_axes(flow.metric is not None)
    variables: dict[str, Any] = {
        name: (axes[name], getattr(flow, name).numpy().copy()) for name in axes if getattr(flow, name) is not None
    }
    for group in CELLS:
        for name, value in getattr(flow, group).items():
            variables[f"{name}_{group}"] = (cells[name], value.numpy().copy())
    coords: dict[str, Any] = {
        "layer": list(flow.layers),
        "src": list(range(len(flow.tokens))),
        "dst": list(flow.destinations),
        "src_token": ("src", list(flow.tokens)),
        "dst_token": ("dst", [flow.tokens[j] for j in flow.destinations]),
        "src_special": ("src", list(flow.special)),
        "layout": ("layer", list(flow.layouts)),
    }
    for name in ("attn", "mlp"):
        if getattr(flow, name) is not None:
            coords["head"] = list(range(getattr(flow, name).shape[1]))
    coords |= {f"{name}_engine": ("layer", list(engine)) for name, engine in flow.engines.items()}
    # netCDF attributes are flat, so the settings travel as one JSON text.
    attrs: dict[str, Any] = {"schema": SCHEMA, "model_name": flow.model_name, "settings": json.dumps(flow.settings)}
    if flow.metric is not None:
        attrs["metric"] = flow.metric
    return xarray.Dataset(variables, coords=coords, attrs=attrs)


def _brief(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
