"""A Flow on disk: safetensors with the labels as JSON in its head, written at once or layer by layer."""

import contextlib
import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from lig_lens.errors import FlowFileError
from lig_lens.files import replacing, write_atomic, writing
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
    head = _head({name: getattr(flow, name) for name in LABELS})
    stored = {name: _numbers(value) for name, value in tensors.items()}
    return write_atomic(path, safetensors_bytes(tensors, metadata=_metadata(head, _checksum(head, stored))))


# Of the length of one; it is filled in at the end.
_NO_CHECKSUM = "-" * 64


class GrowingFile:
    """A Flow file that is written layer by layer, so that the Flow need not fit into memory.

    Layers are the first axis of every tensor, so each is one stretch of the file. Room is taken at once: a full disk
    shows before anything is computed.
    """

    def __init__(self, stream: BinaryIO, labels: Mapping[str, object], shapes: Mapping[str, Sequence[int]]) -> None:
        self._stream, self._shapes, self._starts = stream, shapes, {}
        self._head = _head(labels)
        entries: dict[str, object] = {"__metadata__": _metadata(self._head, _NO_CHECKSUM)}
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
        found = _checksum(self._head, {name: self._stored(name) for name in self._starts})
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


def _head(labels: Mapping[str, object]) -> str:
    return json.dumps({**header_of(labels), "checksummed": True}, ensure_ascii=False, allow_nan=False)


def _metadata(head: str, checksum: str) -> dict[str, str]:
    return {"lig_lens": head, "sha256": checksum}


def _numbers(tensor: Tensor) -> Iterator[Any]:
    """The numbers of a tensor as buffers, layer by layer, since all of them may not fit into memory twice."""
    for layer in tensor if tensor.ndim > 1 else [tensor]:
        yield layer.detach().cpu().contiguous().numpy()


def _checksum(head: str, tensors: Mapping[str, Iterable[Any]]) -> str:
    """SHA-256 over the labels, and over the names and numbers of all tensors in the order of their names."""
    digest = hashlib.sha256(head.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        for piece in tensors[name]:
            digest.update(piece)
    return digest.hexdigest()


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """Labels and tensors of a saved Flow, as arguments for `Flow`, and whether a checksum vouches for them.

    See `Flow.load`.
    """
    file, shown = Path(path), repr(os.fspath(path))
    try:
        file.stat()
    except (OSError, ValueError) as error:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise FlowFileError(
                f"{shown[:200]} cannot be read ({error.args[-1]}): give a file that Flow.save wrote."
            ) from error
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
    checked = header.checksummed or "sha256" in metadata  # older files have none
    if checked:
        stored = {name: _numbers(tensor) for name, tensor in tensors.items()}
        if metadata.get("sha256") != _checksum(metadata["lig_lens"], stored):
            raise FlowFileError(
                f"{shown} is damaged: its labels and numbers are not those that were written (checksum). Take a copy "
                "of it, or compute the Flow again."
            )
    fields = {name: getattr(header, name) for name in LABELS}
    return fields, _group(tensors, shown), checked


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
