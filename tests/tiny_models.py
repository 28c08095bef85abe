"""Tiny random models of every block layout with a word-level tokenizer, made on the spot without a hub."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.overrides import TorchFunctionMode
from transformer_lens.model_bridge import TransformerBridge

LAYOUTS = {
    "bert": "post_ln",
    "gpt2": "pre_ln",
    "llama": "pre_ln",
    "neox": "parallel",
    "gptj": "parallel",
    "gemma2": "pre_post_ln",
    "gemma3": "pre_post_ln",
}
KINDS = tuple(LAYOUTS)
N_LAYERS = 2
VOCAB = 40
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = tuple(f"w{i}" for i in range(VOCAB - len(SPECIAL_TOKENS)))


def _empty_model(kind: str) -> transformers.PreTrainedModel:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "num_hidden_layers": N_LAYERS,
        "intermediate_size": 48,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
    }
    grouped = {"num_attention_heads": 4, "num_key_value_heads": 2}
    gpt_sizes = {"vocab_size": VOCAB, "n_layer": N_LAYERS, "n_positions": 32, "pad_token_id": 0}
    gemma: dict[str, Any] = {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
    if kind == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, num_attention_heads=3))
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt_sizes, n_embd=24, n_head=3))
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **grouped, head_dim=6))
    if kind == "neox":
        # Half of the 8 dimensions: the default quarter is one pair, where all pairings are the same.
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
        sizes.update(hidden_size=32, num_attention_heads=4, rope_parameters=rope)
        return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes))
    if kind == "gptj":
        return transformers.GPTJForCausalLM(transformers.GPTJConfig(**gpt_sizes, n_embd=32, n_head=4, rotary_dim=4))
    if kind == "gemma2":
        # The default cap of 50 would bend scores of this size by less than a thousandth.
        gemma["attn_logit_softcapping"] = 3.0
        return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes, **grouped, **gemma))
    if kind == "gemma3":
        return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes, **grouped, **gemma))
    raise ValueError(f"Unknown kind {kind!r}: use one of {KINDS}.")


def tiny_hf(kind: str, seed: int = 0) -> transformers.PreTrainedModel:
    """Build the two-layer Hugging Face model of `kind`: d_model 24 or 32, vocabulary 40, random weights.

    Biases are away from 0 and norm weights away from 1, so that no term of a block drops out unseen.
    The weights depend on `kind` and `seed` only, not on the global random state.
    """
    with torch.random.fork_rng(devices=[]):
        model = _empty_model(kind).eval()
    return _fill(model, kind, seed)


def _fill(model: transformers.PreTrainedModel, kind: str, seed: int) -> transformers.PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        is_vector = parameter.ndim == 1
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        values *= 0.1 if is_vector else 0.3
        # Gemma's norms multiply by 1 + weight, everybody else's by weight.
        if is_vector and name.endswith("weight") and not kind.startswith("gemma"):
            values += 1
        parameter.data = values.to(parameter.dtype)
        parameter.requires_grad_(False)
    return model


def tiny_tokenizer(kind: str) -> transformers.PreTrainedTokenizerFast:
    """Build a tokenizer with one token per word (w0 … w34); for bert it adds [CLS] and [SEP]."""
    vocabulary = {token: index for index, token in enumerate(SPECIAL_TOKENS + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    common = {"tokenizer_object": tokenizer, "unk_token": "[UNK]", "pad_token": "[PAD]"}
    if kind != "bert":
        return transformers.PreTrainedTokenizerFast(**common, bos_token="[CLS]", eos_token="[SEP]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return transformers.PreTrainedTokenizerFast(**common, cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")


def save_tiny(kind: str, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Save model and tokenizer of `kind` into `folder`, as a local checkpoint."""
    tiny_hf(kind).to(dtype).save_pretrained(folder)
    tiny_tokenizer(kind).save_pretrained(folder)


@functools.lru_cache(maxsize=1)
def _checkpoints() -> tempfile.TemporaryDirectory[str]:
    # Cached, so that the folder lives as long as the process: a bridge may read its tokenizer again later.
    return tempfile.TemporaryDirectory(prefix="tiny_models_")


@functools.cache
def tiny_bridge(kind: str, dtype: torch.dtype = torch.float32) -> TransformerBridge:
    """Load the model of `kind` as a TransformerBridge on the CPU; cached, so do not change it in place."""
    folder = Path(_checkpoints().name) / f"{kind}-{str(dtype).removeprefix('torch.')}"
    save_tiny(kind, folder, dtype)
    return TransformerBridge.boot_transformers(str(folder), dtype=dtype, device="cpu")


def config_bridge(config: transformers.PreTrainedConfig, dtype: torch.dtype = torch.float32) -> TransformerBridge:
    """Load a causal model of any configuration as a TransformerBridge, weights made as for the kinds above."""
    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    folder = tempfile.mkdtemp(dir=_checkpoints().name)
    _fill(model, config.model_type, seed=0).to(dtype).save_pretrained(folder)
    tiny_tokenizer(config.model_type).save_pretrained(folder)
    return TransformerBridge.boot_transformers(folder, dtype=dtype, device="cpu")


def fresh_bridge(kind: str) -> TransformerBridge:
    """Load a bridge that a test may change or break."""
    return tiny_bridge.__wrapped__(kind)


@functools.cache
def compatible_bridge(kind: str) -> TransformerBridge:
    """Load a bridge with TransformerLens' familiar hook names; cached, so do not change it otherwise."""
    model = fresh_bridge(kind)
    model.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    return model


class _Float64Everywhere(TorchFunctionMode):
    """Turns every cast to float32 into one to float64.

    Hugging Face casts RMSNorm, softmax and rotary angles to float32 whatever the model's dtype, so that a
    'float64' model is only good to 1e-7.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def widen(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*(widen(value) for value in args), **{key: widen(value) for key, value in (kwargs or {}).items()})


@functools.cache
def exact_hf(kind: str) -> transformers.PreTrainedModel:
    """Build the same model in float64, rotary frequencies included."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64Everywhere():
            model = _empty_model(kind).eval()
    finally:
        torch.set_default_dtype(before)
    # Outside the mode: float64 draws would be other numbers than those of the float32 model.
    return _fill(model, kind, seed=0).double()


def hf_layers(model: transformers.PreTrainedModel) -> torch.nn.ModuleList:
    """Give the list of blocks of a Hugging Face model."""
    base = model.base_model
    if hasattr(base, "encoder"):
        return base.encoder.layer
    return base.h if hasattr(base, "h") else base.layers


def hf_residuals(kind: str, ids: torch.Tensor) -> torch.Tensor:
    """Run the float64 Hugging Face model; [layer + 1, pos, d_model], entry l enters block l, the last leaves.

    Args:
        kind: which model.
        ids: token ids [pos].
    """
    model = exact_hf(kind)
    last_output: list[torch.Tensor] = []

    def keep(module, args, output):
        last_output.append(output[0] if isinstance(output, tuple) else output)

    # The last of `hidden_states` has the final norm on it, so the last block's output is caught by a hook.
    handle = hf_layers(model)[-1].register_forward_hook(keep)
    try:
        with torch.no_grad(), _Float64Everywhere():
            states = model(ids[None], output_hidden_states=True).hidden_states
    finally:
        handle.remove()
    return torch.stack([*(state[0] for state in states[:N_LAYERS]), last_output[0].reshape(states[0].shape)[0]])
