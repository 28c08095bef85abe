"""What a checkpoint's files hold, against what its model wants: weights, their shapes, and JSON that can be read."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lig_lens.errors import InputError
from lig_lens.models.heads import SERVED_HEADS, listed
from lig_lens.models.served import Served

# Files of JSON that are read on loading.
_JSON = ("config.json", "*_config.json", "tokenizer*.json", "*.index.json", "special_tokens_map.json", "vocab.json")
_POOLER = "pooler."  # of a model without a head: what it gives beside its vectors
# Files of which one holds weights, as they are called by transformers and by others.
_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json", "*.gguf", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")


def cannot_load(folder: Path, name: str, error: Exception) -> str:
    """What is to be said of a folder that no model can be loaded from.

    Args:
        folder: it has a config.json.
        name: how the user called it.
        error: what the libraries raised.
    """
    broken = broken_json(folder)
    if broken:
        return (
            f"The folder {name!r} holds no model that can be loaded: {broken}. Write it anew, or leave it out if it is "
            f"not needed. ({reason(error)})"
        )
    if isinstance(error, OSError) and not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        return (
            f"The folder {name!r} has a config.json and no weights: put them beside it (save_pretrained does), or take "
            "random ones with load_model(..., load_weights=False), describe_boundaries(..., config_only=True) or "
            "lig-lens boundaries --config-only."
        )
    return f"The folder {name!r} holds no model that can be loaded: {reason(error)}"


def reason(error: Exception) -> str:
    """The first line of what an error says, with its kind where that says little by itself."""
    first, *more = str(error).strip().splitlines() or [""]
    text = (f"{first} {more[0].strip()}" if first.endswith(":") and more else first)[:200]
    plain = isinstance(error, (OSError, ValueError, RuntimeError)) and text
    return text if plain else f"{type(error).__name__}: {text}"


def broken_json(folder: Path, names: Sequence[str] = _JSON) -> str:
    """Which JSON file of a folder cannot be read, and why; empty where all can."""
    for file in sorted({file for one in names for file in folder.glob(one)}):
        try:
            json.loads(file.read_bytes())
        except (ValueError, OSError) as error:  # also bytes that are no text
            return f"its {file.name} is broken ({error})"
    return ""


class Odd:
    """Weights that stand in no file, and are random in a model, and those that stand in a file and not in the model.

    Attributes:
        of_head: missing ones of the head, by name.
        of_body: names of other missing ones.
        beyond: names of those of layers that the model has not.
    """

    def __init__(self, model: Any, info: Mapping[str, Any]) -> None:
        names = set(info["missing_keys"])
        self.of_head: list[tuple[str, Tensor]] = []
        self.of_body: list[str] = []
        weights = dict(model.named_parameters())
        prefix = f"{model.base_model_prefix}."
        has_body = prefix != "." and hasattr(model, model.base_model_prefix)
        # What unembeds may be what embeds.
        of_unembed = _weights_of(model, "get_output_embeddings") - _weights_of(model, "get_input_embeddings")
        for name in sorted(names & weights.keys()):
            past_body = name.startswith(_POOLER) or (has_body and not name.startswith(prefix))
            if id(weights[name]) in of_unembed or past_body:
                self.of_head.append((name, weights[name]))
            else:
                self.of_body.append(name)
        lists = {f"{path}.": len(one) for path, one in model.named_modules() if isinstance(one, nn.ModuleList)}
        self.beyond = sorted(
            name
            for name in info["unexpected_keys"]
            if any(name.startswith(path) and _number(name[len(path) :]) >= count for path, count in lists.items())
        )


def check_weights(model: Any, info: Mapping[str, Any], name: str, how: Served) -> Odd:
    """What is odd about a checkpoint whose body has all that it wants.

    Args:
        model: as it was loaded, with random weights for what was missing or of another shape.
        info: that transformers gives of the loading.
        name: how the user called the checkpoint.
        how: it was loaded.

    Raises:
        InputError: weights of other shapes than the config says, or weights below the head that are in no file.
    """
    _check_shapes(model, info["mismatched_keys"], name)
    odd, loaded = Odd(model, info), type(model).__name__
    if odd.of_body and how.other_head(loaded):
        raise InputError(
            f"{name!r} was saved as {how.saved}, whose head lig_lens does not serve ({SERVED_HEADS}), and its body "
            f"does not go into {loaded}, which wants {listed(odd.of_body)}: save the body by itself, "
            f"transformers.{how.saved}.from_pretrained({name!r}).base_model.save_pretrained(folder), with its "
            "tokenizer beside it, and load that folder."
        )
    if odd.of_body:
        places = " and ".join(dict.fromkeys(_place(model, one) for one in odd.of_body))
        raise InputError(
            f"{name!r} lacks weights of its {places}: {listed(odd.of_body)} "
            f"{'stands' if len(odd.of_body) == 1 else 'stand'} in no file of it, and random ones would be "
            f"explained. It was saved as {how.saved or 'an unknown class'} and loaded as {loaded}: take a model that "
            "was saved whole."
        )
    return odd


def _check_shapes(model: Any, mismatched: Any, name: str) -> None:
    """Raise InputError if weights have other shapes than the config says."""
    if not mismatched:
        return
    order = {weight: number for number, weight in enumerate(model.state_dict())}
    (first, held, wanted), *more = sorted(mismatched, key=lambda one: order.get(one[0], len(order)))
    raise InputError(
        f"The config and the weights of {name!r} disagree: {first} has shape {list(held)} in its file, and the config "
        f"makes it {list(wanted)}{f' ({len(more)} more)' if more else ''}. Take the config.json that was saved with "
        "the weights."
    )


def _number(path: str) -> int:
    """The number that a path begins with, -1 for none."""
    first = path.split(".")[0]
    return int(first) if first.isdecimal() else -1


def _weights_of(model: Any, getter: str) -> set[int]:
    """Weights of what a method of the model gives, where that is a module."""
    part = getattr(model, getter, lambda: None)()
    return {id(weight) for weight in part.parameters()} if isinstance(part, nn.Module) else set()


def _place(model: nn.Module, name: str) -> str:
    """What part of a body a weight belongs to."""
    path = name.rpartition(".")[0]
    above = [".".join(path.split(".")[:count]) for count in range(path.count(".") + 1)]
    if any(isinstance(model.get_submodule(one), nn.ModuleList) for one in above):
        return "blocks"
    owner = model.get_submodule(path)
    if isinstance(owner, nn.Embedding) or "embed" in name.lower():
        return "embeddings"
    return "final norm" if "norm" in type(owner).__name__.lower() else "body"
