"""Models of images: TransformerLens' adapter of ViT, for the heads and the relatives that it does not know.

Its blocks are named as ViT's are, also where a family calls what stands in them otherwise.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lig_lens.inputs.pixels import ImageKind


@dataclass(frozen=True)
class ImageNames:
    """Module paths of a family of ViTs.

    Attributes:
        layers: of the body, its blocks.
        norms: of a block, the one before attention and the one before the MLP.
        scales: of a block, what multiplies the outputs of attention and of the MLP, where there is such a thing.
        all_patches: whether the family drops patches at random, in training, and is to see all of them.
    """

    layers: str = "layers"
    norms: tuple[str, str] = ("layernorm_before", "layernorm_after")
    scales: tuple[str, ...] = ()
    all_patches: bool = False


def image_adapter(names: ImageNames) -> type:
    """An adapter for models of images.

    Args:
        names: of their modules.
    """
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
    from transformer_lens.model_bridge.supported_architectures.vit import ViTArchitectureAdapter

    class OrderedPatches(GeneralizedComponent):  # type: ignore[misc]
        """Embeddings of a masked autoencoder that keep the patches in the order in which they stand in the image."""

        def forward(self, pixel_values: Tensor, noise: Tensor | None = None, **options: Any) -> Any:
            # Other families cast by themselves.
            pixels = pixel_values.to(self.patch_embeddings.projection.weight.dtype)
            return super().forward(pixels, noise=in_order(self, pixels) if noise is None else noise, **options)

    class ImageAdapter(ViTArchitectureAdapter):  # type: ignore[misc]
        def prepare_loading(self, model_name: str, model_kwargs: dict[str, Any]) -> None:
            super().prepare_loading(model_name, model_kwargs)
            if names.all_patches:
                model_kwargs["config"].mask_ratio = 0.0

        def prepare_model(self, hf_model: Any) -> None:
            # Not the base class's, which knows the prefixes and heads of two families: a head is no component here,
            # the model computes it by itself.
            body = hf_model.base_model_prefix
            prefix = f"{body}." if hasattr(hf_model, body) else ""
            components = self._build_component_mapping(prefix, with_classifier=False)
            blocks = components["blocks"]
            blocks.name = f"{prefix}{names.layers}"
            for key, name in zip(("ln1", "ln2"), names.norms, strict=True):
                blocks.submodules[key].name = name
            for key, name in zip(("ls1", "ls2"), names.scales, strict=False):
                blocks.submodules[key] = GeneralizedComponent(name=name)
            self._name_mlp(blocks, hf_model.get_submodule(f"{blocks.name}.0.mlp"))
            # Not TransformerLens' component for them, which hands over arguments that only ViT's have.
            embed = OrderedPatches if names.all_patches else GeneralizedComponent
            components["embed"] = embed(name=f"{prefix}embeddings")
            if names.all_patches:
                hf_model.config.mask_ratio = 0.0
            self.component_mapping = components

        def _name_mlp(self, blocks: Any, mlp: Any) -> None:
            """A gated MLP has no fc1 and fc2, and is one component as a whole."""
            if not hasattr(mlp, "fc1"):
                blocks.submodules["mlp"] = GeneralizedComponent(name="mlp")
                blocks.hook_aliases = blocks.hook_aliases | {
                    "hook_mlp_out": "mlp.hook_out",
                    "hook_mlp_in": "mlp.hook_in",
                }

    return ImageAdapter


def in_order(embeddings: Any, pixel_values: Tensor) -> Tensor:
    """The noise by which a masked autoencoder sorts its patches, so that they stay where they are."""
    n_patches = embeddings.patch_embeddings.num_patches
    return torch.arange(n_patches, device=pixel_values.device).expand(len(pixel_values), -1)


def image_arguments(hf_model: Any) -> dict[str, Tensor]:
    """Arguments of a plain model for an arbitrary image, all of whose patches are seen in order."""
    pixels = ImageKind.of(hf_model.config).arbitrary().to(hf_model.dtype)
    embeddings = hf_model.base_model.embeddings
    ordered = {"noise": in_order(embeddings, pixels)} if hasattr(embeddings, "random_masking") else {}
    return {"pixel_values": pixels, **ordered}
