"""The labels of a Flow as JSON: the head of a Flow file and of the JSON export."""

import json
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from lig_lens.errors import FlowFileError

SCHEMA = "lig_lens.flow"
SCHEMA_VERSION = 1


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
    stream: str | None = None
    dst_tokens: tuple[str, ...] = ()
    dst_special: tuple[bool, ...] = ()
    checksummed: bool = False


# What Flows of models with an encoder and a decoder have beside the labels of others.
_OF_STREAMS = ("stream", "dst_tokens", "dst_special")
LABELS = tuple(name for name in FlowHeader.model_fields if not name.startswith(("schema", "checksum")))


def header_of(labels: Mapping[str, object]) -> dict[str, object]:
    """Schema and labels, in the order of the file; what else is in `labels` is left out."""
    kept = [name for name in LABELS if name not in _OF_STREAMS or labels["stream"] is not None]
    # Tuples become lists in JSON.
    return {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **{name: labels[name] for name in kept}}


def parse_header(text: str, shown: str) -> FlowHeader:
    """The labels in the head of a file that messages call `shown`.

    Raises:
        FlowFileError: a newer schema, or labels that are damaged.
    """
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
        raise FlowFileError(f"{shown} has a damaged Flow header ({brief(error)}): save the Flow again.") from error


def brief(error: Exception) -> str:
    """What is wrong with a file, in a few words."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
