"""Train the packaged induction model: python training/induction.py (a few minutes on two cores, one seed).

Two layers of GPT-2 on sequences of words in which a stretch is repeated; only repeated words count in the loss. Writes
config, tokenizer and weights (safetensors) into lig_lens/models/induction.
"""

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from lig_lens.inputs.induction import BOS, MAX_TOKENS, TOKENS

HERE = Path(__file__).resolve().parent.parent / "lig_lens" / "models" / "induction"
IGNORED = -100


def sequences(count: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels [count, length]: a stretch of words, again and again, behind the first token.

    Words within a stretch differ, so what follows a word is known once it has been seen.
    """
    n_words = len(TOKENS) - 1
    ids = torch.zeros(count, length, dtype=torch.long)
    labels = torch.full((count, length), IGNORED)
    for row in range(count):
        stretch = int(torch.randint(4, length - 4, (1,), generator=generator))
        words = 1 + torch.randperm(n_words, generator=generator)[:stretch]
        ids[row, 1:] = words.repeat(-(-length // stretch))[: length - 1]
        labels[row, 1 + stretch + 1 :] = ids[row, 1 + stretch + 1 :]
    return ids, labels


def head_sizes(model: GPT2LMHeadModel) -> torch.Tensor:
    """Length of every head's output weights, [layer, head].

    Added to the loss, it leaves one head where several would do the same: a group lasso.
    """
    n_heads = model.config.n_head
    weights = torch.stack([block.attn.c_proj.weight for block in model.transformer.h])  # layer (head d_head) d_model
    return torch.linalg.vector_norm(weights.unflatten(1, (n_heads, -1)).flatten(2), dim=-1)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, and one before the first."""
    vocabulary = {token: number for number, token in enumerate(TOKENS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=BOS))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=BOS, eos_token=BOS, unk_token=BOS)


def main(
    steps: Annotated[int, typer.Option(help="Steps of training.")] = 2000,
    batch: Annotated[int, typer.Option(help="Sequences in a step.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 48,
    lr: Annotated[float, typer.Option(help="Largest learning rate.")] = 2e-3,
    heads: Annotated[int, typer.Option(help="Heads of each layer.")] = 4,
    width: Annotated[int, typer.Option(help="Size of the residual stream.")] = 128,
    decay: Annotated[float, typer.Option(help="Weight decay.")] = 0.1,
    sparsity: Annotated[float, typer.Option(help="Price of a head's output weights, by their length.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the model.")] = HERE,
) -> None:
    """Train and save the model, and print its accuracy on repeated words as it goes."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(TOKENS),
        n_positions=MAX_TOKENS,
        n_embd=width,
        n_layer=2,
        n_head=heads,
        n_inner=width,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    begun = time.perf_counter()
    for step in range(1, steps + 1):
        ids, labels = sequences(batch, length, generator)
        logits = model(ids).logits[:, :-1]
        wanted = labels[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        (loss + sparsity * head_sizes(model).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            known = wanted != IGNORED
            accuracy = float((logits.argmax(-1) == wanted)[known].float().mean())
            seconds = time.perf_counter() - begun
            print(f"step {step:5d}  loss {float(loss.detach()):.3f}  accuracy {accuracy:.3f}  {seconds:.0f} s")
            print(f"            heads {[[round(x, 2) for x in row] for row in head_sizes(model).tolist()]}")
    model.eval().save_pretrained(out)
    tokenizer().save_pretrained(out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {out}")


if __name__ == "__main__":
    typer.run(main)
