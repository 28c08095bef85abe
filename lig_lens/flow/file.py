"""A Flow on disk: safetensors with the labels as JSON in its head, written at once or layer by layer."""

import contextlib
import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lig_lens.errors import FlowFileError
from lig_lens.files import replacing, writing
from lig_lens.flow.data import FlowData
from lig_lens.flow.header import KIND, LABELS, written
from lig_lens.flow.labels import CELLS as CELLS
from lig_lens.flow.labels import TENSORS
from lig_lens.names import MAPS
from lig_lens.stored import checksum, metadata_of


def save(flow: FlowData, path: str | os.PathLike[str]) -> Path:
    """Write `flow` to `path`; see `Flow.save`."""
    tensors = {name: getattr(flow, name) for name in TENSORS if getattr(flow, name) is not None}
    for group in CELLS:
        tensors |= {f"{group}.{name}": value for name, value in getattr(flow, group).items()}
    return KIND.write(path, written({name: getattr(flow, name) for name in LABELS}), tensors)


# Of the length of one; it is filled in at the end.
_NO_CHECKSUM = "-" * 64


class GrowingFile:
    """A Flow file that is written layer by layer, so that the Flow need not fit into memory.

    Layers are the first axis of every tensor, so each is one stretch of the file. Room is taken at once: a full disk
    shows before anything is computed.
    """

    def __init__(self, stream: BinaryIO, labels: Mapping[str, object], shapes: Mapping[str, Sequence[int]]) -> None:
        self._stream, self._shapes, self._starts = stream, shapes, {}
        self._head = KIND.head(written(labels))
        entries: dict[str, object] = {"__metadata__": metadata_of(self._head, _NO_CHECKSUM)}
        end = 0
        # safetensors wants large elements first.
        for name in sorted(shapes, key=_dtype, reverse=True):
            start, end = end, end + math.prod(shapes[name]) * (4 if _dtype(name) == "F32" else 1)
            self._starts[name] = start
            entries[name] = {"dtype": _dtype(name), "shape": list(shapes[name]), "data_offsets": [start, end]}
        header = json.dumps(entries, ensure_ascii=False, allow_nan=False).encode()
        header += b" " * (-len(header) % 8)
        # The last such run: a token may be one of dashes too, and stands before.
        self._offset, self._checksum_at = 8 + len(header), 8 + header.rindex(_NO_CHECKSUM.encode())
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

    def finish(self) -> None:
        """Add the checksum, once all is there."""
        found = checksum(self._head, {name: self._stored(name) for name in self._starts})
        self._stream.seek(self._checksum_at)
        self._stream.write(found.encode())

    def _stored(self, name: str) -> Iterator[bytes]:
        """The numbers of a tensor, layer by layer."""
        count, *shape = self._shapes[name]
        size = math.prod(shape) * (4 if _dtype(name) == "F32" else 1)
        for index in range(count):
            self._stream.seek(self._offset + self._starts[name] + index * size)
            yield self._stream.read(size)


@contextlib.contextmanager
def growing(
    path: str | os.PathLike[str], labels: Mapping[str, object], shapes: Mapping[str, Sequence[int]]
) -> Iterator[Callable[[str, int, Tensor], None]]:
    """Give what writes a tensor's layer into a new Flow file, which is there, whole, once this ends without an error.

    Args:
        path: where it goes.
        labels: what a Flow holds beside its tensors, by name.
        shapes: of all its tensors, under the names that they have in the file (`attn`, `gap.attn`).

    Raises:
        InputError: `path` cannot be written.
        OutputError: no room for the file.
    """
    with replacing(path) as beside:
        with writing(path):
            stream = open(beside, "w+b")
        try:
            with writing(path):
                file = GrowingFile(stream, labels, shapes)

            def put(name: str, index: int, value: Tensor) -> None:
                with writing(path):
                    file.put(name, index, value)

            yield put
            with writing(path):
                file.finish()
                stream.flush()
                os.fsync(stream.fileno())
        finally:
            with writing(path):
                stream.close()


def _dtype(name: str) -> str:
    return "BOOL" if name.startswith("converged") else "F32"


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """Labels and tensors of a saved Flow, as arguments for `Flow`, and whether a checksum vouches for them.

    See `Flow.load`.
    """
    stored = KIND.read(path)
    fields = {name: getattr(stored.header, name) for name in LABELS}
    return fields, _group(stored.tensors, repr(os.fspath(path))), stored.checked


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
