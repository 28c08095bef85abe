"""The labels of a Flow as JSON: the head of a Flow file and of the JSON export."""

from collections.abc import Mapping

from pydantic import JsonValue

from lig_lens.errors import FlowFileError
from lig_lens.stored import Header, Kind, labels_of

SCHEMA = "lig_lens.flow"


class FlowHeader(Header):
    """The labels of a Flow, as they stand in the safetensors header and in the JSON export."""

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


KIND = Kind("Flow", SCHEMA, 1, FlowHeader, FlowFileError)

# What Flows of models with an encoder and a decoder have beside the labels of others.
_OF_STREAMS = ("stream", "dst_tokens", "dst_special")
LABELS = labels_of(FlowHeader)


def written(labels: Mapping[str, object]) -> dict[str, object]:
    """The labels that a file has, in its order; what else is in `labels` is left out."""
    return {name: labels[name] for name in LABELS if name not in _OF_STREAMS or labels["stream"] is not None}
