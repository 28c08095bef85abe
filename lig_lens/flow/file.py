"""A Flow on disk: safetensors with the labels as JSON in its head, written at once or layer by layer."""

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from lig_lens.errors import FlowFileError
from lig_lens.files import replacing, write_atomic
from lig_lens.flow.data import FlowData
from lig_lens.flow.header import LABELS, brief, header_of, parse_header
from lig_lens.flow.labels import CELLS as CELLS
from lig_lens.flow.labels import TENSORS
from lig_lens.names import MAPS


def save(flow: FlowData, path: str | os.PathLike[str]) -> Path:
    """Write `flow` to `path`; see `Flow.save`. The labels are one JSON text in the metadata."""
    tensors = {name: getattr(flow, name) for name in TENSORS if getattr(flow, name) is not None}
    for group in CELLS:
        tensors |= {f"{group}.{name}": value for name, value in getattr(flow, group).items()}
    # safetensors refuses tensors that share memory, which slices of one result may do.
    tensors = {name: value.clone() for name, value in tensors.items()}
    labels = {name: getattr(flow, name) for name in LABELS}
    return write_atomic(path, safetensors_bytes(tensors, metadata=_metadata(labels)))


class GrowingFile:
    """A Flow file that is written layer by layer, so that the Flow need not fit into memory.

    Layers are the first axis of every tensor, so each is one stretch of the file. Room is taken at once: a full disk
    shows before anything is computed.
    """

    def __init__(self, stream: BinaryIO, labels: Mapping[str, object], shapes: Mapping[str, Sequence[int]]) -> None:
        self._stream, self._shapes, self._starts = stream, shapes, {}
        entries: dict[str, object] = {"__metadata__": _metadata(labels)}
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
    path: str | os.PathLike[str], labels: Mapping[str, object], shapes: Mapping[str, Sequence[int]]
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


def _metadata(labels: Mapping[str, object]) -> dict[str, str]:
    return {"lig_lens": json.dumps(header_of(labels), ensure_ascii=False, allow_nan=False)}


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
            f"{shown} cannot be read as safetensors ({brief(error)}): it is damaged or another kind of "
            "file. Give a file that Flow.save wrote."
        ) from error
    if "lig_lens" not in metadata:
        raise FlowFileError(
            f"{shown} is a safetensors file but holds no Flow (no 'lig_lens' in its header): "
            "give one that Flow.save wrote."
        )
    header = parse_header(metadata["lig_lens"], shown)
    fields = {name: getattr(header, name) for name in LABELS}
    return fields, _group(tensors, shown)


def _group(tensors: dict[str, Tensor], shown: str) -> dict[str, Any]:
    """`{"attn": ..., "gap.attn": ...}` as `{"attn": ..., "gap": {"attn": ...}}`."""
    grouped: dict[str, Any] = {group: {} for group in CELLS}
    for name, tensor in tensors.items():
        group, _, map_name = name.partition(".")
        expected = torch.bool if group == "converged" else torch.float32
        known = name in TENSORS or (group in CELLS and map_name in MAPS)
        if not known or tensor.dtype != expected:
            raise FlowFileError(
                f"{shown} holds an unexpected tensor {name!r} ({tensor.dtype}): it is damaged. Save the Flow again."
            )
        if map_name:
            grouped[group][map_name] = tensor
        else:
            grouped[name] = tensor
    return grouped
