"""Results on disk: safetensors whose head holds the labels as one JSON text, with a schema and a checksum."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from lig_lens.errors import ResultFileError
from lig_lens.files import write_atomic

_HEAD, _CHECKSUM = "lig_lens", "sha256"


class Header(BaseModel):
    """The labels of a result, as they stand in a file's head.

    A key that is not known here may have been added within this schema version, and is passed over.
    """

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    schema_name: str
    schema_version: int
    checksummed: bool = False


def labels_of(kind: type[Header]) -> tuple[str, ...]:
    """Names of a header's fields, without those that all headers have."""
    return tuple(name for name in kind.model_fields if name not in Header.model_fields)


H = TypeVar("H", bound=Header)


@dataclass(frozen=True)
class Stored(Generic[H]):
    """What a file holds; `checked` says whether a checksum vouches for it."""

    header: H
    tensors: dict[str, Tensor]
    checked: bool


@dataclass(frozen=True)
class Kind(Generic[H]):
    """One kind of result that is stored.

    Attributes:
        name: of its class, whose `save` writes it.
        schema: what its files are called in their head.
        version: the newest that can be read.
        header: its labels.
        error: raised of files that cannot be used.
    """

    name: str
    schema: str
    version: int
    header: type[H]
    error: type[ResultFileError]

    def labelled(self, labels: Mapping[str, object]) -> dict[str, object]:
        """Schema and labels, in the order of the file."""
        return {"schema": self.schema, "schema_version": self.version, **labels}

    def head(self, labels: Mapping[str, object]) -> str:
        """The same as the text in a file's head, which says that there is a checksum."""
        return json.dumps({**self.labelled(labels), "checksummed": True}, ensure_ascii=False, allow_nan=False)

    def write(self, path: str | os.PathLike[str], labels: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Path:
        """Write a result in one step.

        Raises:
            InputError: `path` cannot be written.
            OutputError: the disk fails.
        """
        # safetensors refuses tensors that share memory, which slices of one result may do.
        kept = {name: value.clone() for name, value in tensors.items()}
        head = self.head(labels)
        return write_atomic(path, safetensors_bytes(kept, metadata=metadata_of(head, _checksum_of(head, kept))))

    def read(self, path: str | os.PathLike[str]) -> Stored[H]:
        """Read what `write` wrote.

        Raises:
            ResultFileError: no such file, one that is damaged or holds something else, or has a newer schema; as
                `error`.
        """
        metadata, tensors, shown = self._opened(path)
        if _HEAD not in metadata:
            raise self.error(
                f"{shown} is a safetensors file but holds no {self.name} (no {_HEAD!r} in its header): "
                f"give one that {self.name}.save wrote."
            )
        header = self._parsed(metadata[_HEAD], shown)
        checked = header.checksummed or _CHECKSUM in metadata  # older files have none
        if checked and metadata.get(_CHECKSUM) != _checksum_of(metadata[_HEAD], tensors):
            raise self.error(
                f"{shown} is damaged: its labels and numbers are not those that were written (checksum). Take a copy "
                f"of it, or compute the {self.name} again."
            )
        return Stored(header, tensors, checked)

    def _opened(self, path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor], str]:
        file, shown = Path(path), repr(os.fspath(path))
        remedy = f"give a file that {self.name}.save wrote."
        try:
            file.stat()
        except (OSError, ValueError) as error:
            if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
                raise self.error(f"{shown[:200]} cannot be read ({error.args[-1]}): {remedy}") from error
        if not file.is_file():
            kind = f"is a folder, not a {self.name} file" if file.is_dir() else "does not exist"
            raise self.error(f"{shown} {kind}: {remedy}")
        try:
            with safe_open(file, framework="pt") as stored:
                return stored.metadata() or {}, {name: stored.get_tensor(name) for name in stored.keys()}, shown
        except (SafetensorError, OSError, ValueError) as error:
            raise self.error(
                f"{shown} cannot be read as safetensors ({_brief(error)}): it is damaged or another kind of file. "
                f"{remedy[0].upper()}{remedy[1:]}"
            ) from error

    def _parsed(self, text: str, shown: str) -> H:
        try:
            raw = json.loads(text)
            found, version = raw["schema"], raw["schema_version"]
            if found != self.schema or type(version) is not int:
                raise ValueError(f"schema {found!r}, version {version!r}")
            if version > self.version:
                raise self.error(
                    f"{shown} has {self.name} schema version {version}, and this lig_lens reads up to {self.version}: "
                    "update it with pip install --upgrade lig-lens."
                )
            if version < 1:
                raise ValueError(f"schema version {version}")
            raw["schema_name"] = raw.pop("schema")
            return self.header.model_validate_json(json.dumps(raw))
        except self.error:
            raise
        except (ValidationError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self.error(
                f"{shown} has a damaged {self.name} header ({_brief(error)}): save the {self.name} again."
            ) from error


def schema_in(path: str | os.PathLike[str]) -> str | None:
    """The schema that the head of a file names; None where none can be read."""
    try:
        with safe_open(Path(path), framework="pt") as stored:
            return str(json.loads((stored.metadata() or {})[_HEAD])["schema"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def metadata_of(head: str, checksum: str) -> dict[str, str]:
    """The metadata of a safetensors file."""
    return {_HEAD: head, _CHECKSUM: checksum}


def checksum(head: str, tensors: Mapping[str, Iterable[Any]]) -> str:
    """SHA-256 over the labels, and over the names and numbers of all tensors in the order of their names.

    Args:
        head: the labels as they are written.
        tensors: numbers of each tensor, as buffers one after another.
    """
    digest = hashlib.sha256(head.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        for piece in tensors[name]:
            digest.update(piece)
    return digest.hexdigest()


def _checksum_of(head: str, tensors: Mapping[str, Tensor]) -> str:
    return checksum(head, {name: _numbers(tensor) for name, tensor in tensors.items()})


def _numbers(tensor: Tensor) -> Iterator[Any]:
    """The numbers of a tensor as buffers, layer by layer, since all of them may not fit into memory twice."""
    for layer in tensor if tensor.ndim > 1 else [tensor]:
        yield layer.detach().cpu().contiguous().numpy()


def nested(tensor: Tensor) -> object:
    """Nested lists, as JSON has them; floats with the nine digits that identify a float32, non-finite ones as None."""
    if tensor.ndim == 0:
        return tensor.item()
    if tensor.ndim > 1:
        return [nested(row) for row in tensor]
    if not tensor.is_floating_point():
        return tensor.tolist()
    finite = tensor.isfinite().tolist()
    return [float(f"{x:.9g}") if ok else None for x, ok in zip(tensor.tolist(), finite, strict=True)]


def write_json(document: Mapping[str, object], path: str | os.PathLike[str] | None) -> str:
    """A document as JSON text; also written to `path`, if given.

    Raises:
        InputError: `path` cannot be written.
    """
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    if path is not None:
        write_atomic(path, (text + "\n").encode())
    return text


def _brief(error: Exception) -> str:
    """What is wrong with a file, in a few words."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
