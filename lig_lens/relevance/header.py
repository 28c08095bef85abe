"""The labels of a Relevance as JSON: the head of its file and of the JSON export."""

from pydantic import JsonValue

from lig_lens.errors import RelevanceFileError
from lig_lens.stored import Header, Kind, labels_of

SCHEMA = "lig_lens.relevance"


class RelevanceHeader(Header):
    """The labels of a Relevance, as they stand in the safetensors header and in the JSON export."""

    method: str
    target: str
    value: float
    reference: float | None = None
    tokens: tuple[str, ...]
    special: tuple[bool, ...]
    layers: tuple[int, ...]
    boundaries: tuple[int, ...] = ()
    model_name: str
    settings: dict[str, JsonValue]


KIND = Kind("Relevance", SCHEMA, 1, RelevanceHeader, RelevanceFileError)
LABELS = labels_of(RelevanceHeader)
