"""Train the packaged sentiment classifier: python training/sentiment.py (seven minutes on one core, one seed).

MiniLM with a class head learns whether people scored a sentence of a film review above or below 0. The matrices of its
blocks get low-rank updates; pooler and class head are trained whole. Only what was learned is written, into
lig_lens/models/sentiment; `load_model("sentiment")` adds it to the packaged MiniLM.
"""

import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from scipy.stats import binomtest
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from lig_lens.inputs.movie_sentences import movie_sentences
from lig_lens.models.packaged import DELTAS, PACKAGED, SENTIMENT, add_learned, weights_digest, with_class_head

LABELS = {0: "negative", 1: "positive"}
# A mean score further from 0 is one that people agree on.
CLEAR = 0.5

Example = tuple[list[int], float]  # token ids and score


class LowRank(nn.Module):
    """A linear map with an update `up @ down` to its weight, nothing at first."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """The updated map of vectors [..., input]."""
        return self.linear(x) + x @ self.down.T @ self.up.T


def classifier(config: Any, rank: int) -> tuple[Any, dict[str, nn.Parameter]]:
    """MiniLM with a class head, and what of it is trained, by the names under which it is written."""
    model = with_class_head(PACKAGED["minilm"](), config)
    model.bert.embeddings.requires_grad_(False)
    encoder = model.bert.encoder.requires_grad_(False)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    linear = {name: module for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
    for name, module in linear.items():
        holder, _, last = name.rpartition(".")
        updated = LowRank(module, rank)
        setattr(encoder.get_submodule(holder), last, updated)
        trained[f"bert.encoder.{name}.weight.down"] = updated.down
        trained[f"bert.encoder.{name}.weight.up"] = updated.up
    return model, trained


def batches(examples: Sequence[Example], size: int, draw: random.Random) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Token ids and mask [sentence, pos] and scores [sentence], in a drawn order, those of like length together."""
    drawn = draw.sample(examples, len(examples))
    stretch = 32 * size
    alike = [x for k in range(0, len(drawn), stretch) for x in sorted(drawn[k : k + stretch], key=lambda x: len(x[0]))]
    cut = [alike[k : k + size] for k in range(0, len(alike), size)]
    for batch in draw.sample(cut, len(cut)):
        ids = nn.utils.rnn.pad_sequence([torch.tensor(one) for one, _ in batch], batch_first=True, padding_value=-1)
        yield ids.clamp(min=0), (ids >= 0).long(), torch.tensor([score for _, score in batch])


def accuracy(model: Any, examples: Sequence[Example]) -> str:
    """Share of sentences whose class has the sign of their score, of all and of those with a clear one; in words."""
    model.eval()
    right, scores = [], []
    with torch.no_grad():
        for ids, mask, score in batches(examples, 64, random.Random(0)):
            said = model(input_ids=ids, attention_mask=mask).logits.argmax(-1) == 1
            right.append(said == (score > 0))
            scores.append(score)
    every, clear = torch.cat(right), torch.cat(right)[torch.cat(scores).abs() > CLEAR]
    return f"{interval(every)} of all, {interval(clear)} of those with |score| > {CLEAR}"


def interval(right: Tensor) -> str:
    """A share with Wilson's 95 % interval."""
    n, count = len(right), int(right.sum())
    low, high = binomtest(count, n).proportion_ci(method="wilson")
    return f"{count / n:.1%} ({low:.1%} to {high:.1%}, {n} sentences)"


def main(
    epochs: Annotated[int, typer.Option(help="Times that each sentence is seen.")] = 2,
    batch: Annotated[int, typer.Option(help="Sentences in a step.")] = 32,
    lr: Annotated[float, typer.Option(help="Largest learning rate.")] = 1e-3,
    rank: Annotated[int, typer.Option(help="Of the updates.")] = 8,
    decay: Annotated[float, typer.Option(help="Weight decay.")] = 0.01,
    tune: Annotated[int, typer.Option(help="Test on so many of the training sentences, and write nothing.")] = 0,
    seed: Annotated[int, typer.Option(help="Of weights and order.")] = 0,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for what was learned.")] = SENTIMENT,
) -> None:
    """Train, write what was learned, and print how many held-out sentences the model that loads is right about."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    base = PACKAGED["minilm"]()
    tokenizer = AutoTokenizer.from_pretrained(base)

    def examples(split: str) -> list[Example]:
        scored = [(text, score) for text, score in movie_sentences(split) if score]  # 0 is neither
        ids = tokenizer([text for text, _ in scored], truncation=True, padding=False)["input_ids"]
        return [(one, score) for one, (_, score) in zip(ids, scored, strict=True)]

    train = examples("train")
    tested, train = (train[:tune], train[tune:]) if tune else (examples("held_out"), train)
    config = AutoConfig.from_pretrained(base, id2label=LABELS, label2id={name: k for k, name in LABELS.items()})
    model, trained = classifier(config, rank)
    optimizer = torch.optim.AdamW(trained.values(), lr=lr, weight_decay=decay)
    steps = epochs * -(-len(train) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    draw, begun = random.Random(seed), time.perf_counter()
    for epoch in range(1, epochs + 1):
        model.train()
        losses = []
        for ids, mask, score in batches(train, batch, draw):
            logits = model(input_ids=ids, attention_mask=mask).logits
            loss = nn.functional.cross_entropy(logits, (score > 0).long())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        seconds = time.perf_counter() - begun
        print(f"epoch {epoch}  loss {sum(losses) / len(losses):.3f}  {seconds:.0f} s", flush=True)
        if tune:
            print(f"         right about {accuracy(model, tested)}", flush=True)
    if tune:
        return
    learned = {name: weight.detach().half().contiguous() for name, weight in trained.items()}
    written = with_class_head(base, config).eval()
    add_learned(written, learned)
    print(f"held out: right about {accuracy(model, tested)}")
    print(f"as it is written: right about {accuracy(written, tested)}")
    out.mkdir(parents=True, exist_ok=True)
    config.architectures = [type(written).__name__]
    config.save_pretrained(out)
    save_file(learned, out / DELTAS, {"base_sha256": weights_digest(base)})
    print(f"{sum(weight.numel() for weight in learned.values()):,} numbers in {out}")


if __name__ == "__main__":
    typer.run(main)
