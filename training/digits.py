"""Train the packaged model of digits: python training/digits.py (minutes on one core, one seed; needs scikit-learn).

A masked autoencoder (ViTMAEForPreTraining) learns to fill in the pixels that are hidden from it; its encoder
then becomes a classifier (ViTForImageClassification), and its decoder is dropped. Writes config, image processor and
weights (safetensors) into lig_lens/models/digits, and prints the accuracy on images that were held out.
"""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Float, Int
from scipy.stats import binomtest
from torch import Tensor
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from lig_lens.inputs.digit_images import MEAN, SIZE, STD, digit_images

HERE = Path(__file__).resolve().parent.parent / "lig_lens" / "models" / "digits"
BLACK = -MEAN / STD
N_TO_CHOOSE_BY = 280


def moved(pixels: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch 1 height width"]:
    """Images turned (by 10° at most), stretched (10 %) and shifted (one pixel) at random, on black."""
    n = len(pixels)

    def uniform(largest: float) -> Tensor:
        return (2 * torch.rand(n) - 1) * largest

    angle, step = uniform(math.radians(10)), 2 / SIZE
    across, down = 1 + uniform(0.1), 1 + uniform(0.1)
    rows = [
        torch.stack([across * angle.cos(), -angle.sin(), uniform(step)], 1),
        torch.stack([angle.sin(), down * angle.cos(), uniform(step)], 1),
    ]
    grid = torch.nn.functional.affine_grid(torch.stack(rows, 1), list(pixels.shape), align_corners=False)
    return torch.nn.functional.grid_sample(pixels - BLACK, grid, align_corners=False) + BLACK


def fitted(
    model: Any, what: str, epochs: int, lr: float, decay: float, batch: int, n_images: int
) -> Iterator[tuple[Int[Tensor, " batch"], Callable[[Tensor], None]]]:
    """Numbers of images, batch by batch, each with what takes a step down the loss; prints how it goes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay, betas=(0.9, 0.98))
    steps = epochs * -(-n_images // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    begun, losses = time.perf_counter(), list[float]()

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))

    for epoch in range(1, epochs + 1):
        losses.clear()
        for numbers in torch.randperm(n_images).split(batch):
            yield numbers, step
        if epoch % 10 == 0:
            mean, seconds = sum(losses) / len(losses), time.perf_counter() - begun
            print(f"{what}: epoch {epoch:4d}  loss {mean:.3f}  {seconds:.0f} s", flush=True)


def autoencoder_of(masked: float, **sizes: Any) -> ViTMAEForPreTraining:
    """A masked autoencoder with a small decoder, and positions that are learned."""
    decoder = {
        "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 64,
    }  # fmt: skip
    model = ViTMAEForPreTraining(ViTMAEConfig(**sizes, **decoder, mask_ratio=masked))
    # Both are made as zeros that are not trained (transformers 5.23): without them, all patches look alike.
    for positions in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        torch.nn.init.normal_(positions.requires_grad_(True), std=0.5)
    return model


def classifier_of(autoencoder: ViTMAEForPreTraining, pixels: Tensor, **sizes: Any) -> ViTForImageClassification:
    """A classifier with the encoder of an autoencoder, and a head at random.

    Raises:
        RuntimeError: a weight has no counterpart, or the two encoders give other vectors for some images.
    """
    names = {number: str(number) for number in range(10)}
    config = ViTConfig(**sizes, id2label=names, label2id={name: number for number, name in names.items()})
    model = ViTForImageClassification(config).eval()
    model.vit.load_state_dict(autoencoder.vit.state_dict())
    autoencoder.config.mask_ratio = 0.0
    in_order = torch.arange(model.vit.embeddings.patch_embeddings.num_patches).expand(len(pixels), -1)
    with torch.no_grad():
        before = autoencoder.eval().vit(pixels, noise=in_order).last_hidden_state
        after = model.vit(pixels).last_hidden_state
    if not torch.allclose(before, after, rtol=0, atol=1e-5):
        raise RuntimeError(f"the encoders differ by {float((before - after).abs().max()):.1e}")
    return model


def read(split: str) -> tuple[Float[Tensor, "image 1 height width"], Int[Tensor, " image"]]:
    """Images and classes."""
    images = digit_images(split)
    return torch.stack([image.pixels for image in images]), torch.tensor([image.label for image in images])


def main(
    patch: Annotated[int, typer.Option(help="Pixels along a patch.")] = 2,
    width: Annotated[int, typer.Option(help="Size of the residual stream.")] = 64,
    layers: Annotated[int, typer.Option(help="Of the encoder.")] = 4,
    heads: Annotated[int, typer.Option(help="Of each layer.")] = 4,
    masked: Annotated[float, typer.Option(help="Share of patches that the encoder does not see.")] = 0.75,
    filling: Annotated[int, typer.Option(help="Epochs of filling in patches.")] = 60,
    naming: Annotated[int, typer.Option(help="Epochs of naming digits.")] = 90,
    batch: Annotated[int, typer.Option(help="Images in a step.")] = 32,
    lr: Annotated[float, typer.Option(help="Largest learning rate.")] = 1e-3,
    decay: Annotated[float, typer.Option(help="Weight decay.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Of weights, batches and what is done to images.")] = 0,
    choosing: Annotated[
        bool, typer.Option(help="Hold out images from those for training, to choose options by.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for the model; nothing is written while choosing.")] = HERE,
) -> None:
    """Train the model, print its accuracy on images that were held out, and save it."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    pixels, labels = read("train")
    if choosing:
        (pixels, unseen), (labels, answers) = (
            part.split([len(labels) - N_TO_CHOOSE_BY, N_TO_CHOOSE_BY]) for part in (pixels, labels)
        )
    else:
        unseen, answers = read("held_out")
    sizes = {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 2 * width,
        "image_size": SIZE, "patch_size": patch, "num_channels": 1, "initializer_range": 0.1,
    }  # fmt: skip
    autoencoder = autoencoder_of(masked, **sizes).train()
    for numbers, step in fitted(autoencoder, "filling in", filling, 2 * lr, decay, batch, len(pixels)):
        step(autoencoder(moved(pixels[numbers])).loss)
    model = classifier_of(autoencoder, pixels[:8], **sizes).train()
    for numbers, step in fitted(model, "naming", naming, lr, decay, batch, len(pixels)):
        step(torch.nn.functional.cross_entropy(model(moved(pixels[numbers])).logits, labels[numbers]))
    with torch.no_grad():
        right = int((model.eval()(unseen).logits.argmax(-1) == answers).sum())
    low, high = binomtest(right, len(answers)).proportion_ci(method="wilson")
    print(
        f"held out: {right} of {len(answers)} right, {right / len(answers):.1%} (95 % interval {low:.1%} to {high:.1%})"
    )
    if not choosing:
        model.save_pretrained(out)
        look = {"image_mean": [MEAN], "image_std": [STD], "size": {"height": SIZE, "width": SIZE}}
        ViTImageProcessorPil(**look).save_pretrained(out)
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {out}")


if __name__ == "__main__":
    typer.run(main)
