"""Tiny models of images, saved and loaded as a user would, and images for them."""

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

import lig_lens as ll

SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 12,
    "patch_size": 4,
}  # fmt: skip
CLASSES = {**SMALL, "num_labels": 5}
DINO = {**{key: value for key, value in CLASSES.items() if key != "intermediate_size"}, "mlp_ratio": 2}
REGISTERS = {**DINO, "num_register_tokens": 2}
MASKED = {
    **SMALL, "decoder_num_attention_heads": 4, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1,
    "decoder_intermediate_size": 24,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "ViTModel": SMALL,
    "ViTForImageClassification": CLASSES,
    "DeiTModel": SMALL,
    "DeiTForImageClassification": CLASSES,
    "DeiTForImageClassificationWithTeacher": CLASSES,
    "Dinov2Model": DINO,
    "Dinov2ForImageClassification": DINO,
    "Dinov2WithRegistersModel": REGISTERS,
    "Dinov2WithRegistersForImageClassification": REGISTERS,
    "ViTMAEModel": MASKED,
    "ViTMAEForPreTraining": MASKED,
}
CLASSIFIERS = [kind for kind in KINDS if "ForImageClassification" in kind]
PATCHES = tuple(f"r{row}c{column}" for row in range(3) for column in range(3))


def image(seed: int = 0, *size: int) -> torch.Tensor:
    return torch.randn(3, *(size or (12, 12)), generator=torch.Generator().manual_seed(seed))


def saved(kind: str, folder: Path, **more: Any) -> Any:
    """Save a random model of a class of transformers, with weights large enough to matter; gives the plain model."""
    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**KINDS[kind], **more})).eval()
    for weight in model.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return model


def load(folder: Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ll.BridgeWarning)
        return ll.load_model(str(folder), device="cpu", **options)


def in_order(plain: Any) -> dict[str, torch.Tensor]:
    """Arguments by which a plain masked autoencoder sees all patches in order; none for other models."""
    if not hasattr(plain.config, "mask_ratio"):
        return {}
    plain.config.mask_ratio = 0.0
    return {"noise": torch.arange(9.0)[None]}
