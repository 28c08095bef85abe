"""Families that TransformerLens' bridge does not take by itself, or not rightly: which adapter serves them, and how.

A family whose modules are those of another, under other names, is a line here. All of them are held against the plain
transformers model (`tests/test_families.py`, `tests/test_encoders.py`).
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from lig_lens.models.adapters.cohere import cohere_adapter
from lig_lens.models.adapters.deberta import prepare_deberta, prepare_deberta_v2
from lig_lens.models.adapters.encoders import Encoder
from lig_lens.models.adapters.falcon import falcon_adapter
from lig_lens.models.adapters.fused import split_modernbert
from lig_lens.models.adapters.granite_hybrid import granite_hybrid_adapter
from lig_lens.models.adapters.images import ImageNames
from lig_lens.models.adapters.mixers import with_attention
from lig_lens.models.adapters.own_modules import unroll_albert
from lig_lens.models.adapters.xglm import xglm_adapter

# The class of transformers that a model was saved as -> the architecture that the bridge knows, with the same modules.
KIN: Mapping[str, str] = MappingProxyType(
    {
        "PhimoeForCausalLM": "PhiMoEForCausalLM",
        "MinistralForCausalLM": "MistralForCausalLM",
        "CwmForCausalLM": "MistralForCausalLM",
        "HeliumForCausalLM": "Ernie4_5ForCausalLM",  # rotates neighbouring dimensions
    }
)

_ROBERTA_HEAD = {"mlm_head": "lm_head.dense", "ln_final": "lm_head.layer_norm", "unembed": "lm_head.decoder"}
_LLAMA_NAMES = {
    "blocks": "{body}.layers",
    "blocks.ln1": "post_attention_layernorm",
    "blocks.ln2": "post_mlp_layernorm",
    "blocks.attn": "self_attn",
    **{f"blocks.attn.{part}": f"{part}_proj" for part in ("q", "k", "v", "o")},
    "blocks.mlp": "mlp",
}
_LLAMA_MLP = {"blocks.mlp.gate": "gate_proj", "blocks.mlp.in": "up_proj", "blocks.mlp.out": "down_proj"}
_DEBERTA_V2 = {"blocks.attn.q": "self.query_proj", "blocks.attn.k": "self.key_proj", "blocks.attn.v": "self.value_proj"}
# Masked language models: what is where, if not where BERT has it.
ENCODERS: Mapping[str, Encoder] = MappingProxyType(
    {
        **dict.fromkeys(
            ("RobertaForMaskedLM", "XLMRobertaForMaskedLM", "CamembertForMaskedLM"), Encoder("roberta", _ROBERTA_HEAD)
        ),
        "Data2VecTextForMaskedLM": Encoder("data2vec_text", _ROBERTA_HEAD),
        "ErnieForMaskedLM": Encoder("ernie", {}),
        "ElectraForMaskedLM": Encoder(
            "electra",
            {
                "mlm_head": "generator_predictions.dense",
                "ln_final": "generator_predictions.LayerNorm",
                "unembed": "generator_lm_head",
            },
        ),
        "AlbertForMaskedLM": Encoder(
            "albert",
            {
                "blocks": "{body}.encoder.albert_layer_groups",
                "blocks.ln1": "attention.LayerNorm",
                "blocks.ln2": "full_layer_layer_norm",
                "blocks.attn.q": "query",
                "blocks.attn.k": "key",
                "blocks.attn.v": "value",
                "blocks.attn.o": "dense",
                "blocks.mlp.in": "ffn",
                "blocks.mlp.out": "ffn_output",
                "mlm_head": "predictions.dense",
                "ln_final": "predictions.LayerNorm",
                "unembed": "predictions.decoder",
            },
            prepare=unroll_albert,
        ),
        "DistilBertForMaskedLM": Encoder(
            "distilbert",
            {
                "blocks": "{body}.transformer.layer",
                "blocks.ln1": "sa_layer_norm",
                "blocks.ln2": "output_layer_norm",
                "blocks.attn.q": "q_lin",
                "blocks.attn.k": "k_lin",
                "blocks.attn.v": "v_lin",
                "blocks.attn.o": "out_lin",
                "blocks.mlp.in": "ffn.lin1",
                "blocks.mlp.out": "ffn.lin2",
                "mlm_head": "vocab_transform",
                "ln_final": "vocab_layer_norm",
                "unembed": "vocab_projector",
            },
        ),
        "MPNetForMaskedLM": Encoder(
            "mpnet",
            {
                "blocks.ln1": "attention.LayerNorm",
                "blocks.attn": "attention.attn",
                "blocks.attn.q": "q",
                "blocks.attn.k": "k",
                "blocks.attn.v": "v",
                "blocks.attn.o": "o",
                **_ROBERTA_HEAD,
            },
        ),
        "ModernBertForMaskedLM": Encoder(
            "model",
            {
                "embed": "{body}.embeddings.tok_embeddings",
                "embed_ln": "{body}.embeddings.norm",
                "blocks": "{body}.layers",
                "blocks.ln1": "attn_norm",
                "blocks.ln2": "mlp_norm",
                "blocks.attn": "attn",
                "blocks.attn.q": "Wqkv.q",
                "blocks.attn.k": "Wqkv.k",
                "blocks.attn.v": "Wqkv.v",
                "blocks.attn.o": "Wo",
                "blocks.mlp": "mlp",
                "blocks.mlp.gate": "Wi.gate",
                "blocks.mlp.in": "Wi.up",
                "blocks.mlp.out": "Wo",
                "mlm_head": "head.dense",
                "ln_final": "{body}.final_norm",
                "unembed": "decoder",
            },
            pre_ln=True,
            gated=True,
            prepare=split_modernbert,
        ),
        "NomicBertForMaskedLM": Encoder(
            "nomic_bert",
            {**_LLAMA_NAMES, **_LLAMA_MLP, "ln_final": "cls.predictions.transform.layer_norm"},
            gated=True,
        ),
        "GteForMaskedLM": Encoder("gte", {**_LLAMA_NAMES, **_LLAMA_MLP, **_ROBERTA_HEAD}, gated=True),
        "JinaEmbeddingsV3ForMaskedLM": Encoder(
            "roberta", {**_LLAMA_NAMES, "blocks.mlp.in": "fc1", "blocks.mlp.out": "fc2", **_ROBERTA_HEAD}
        ),
        "EuroBertForMaskedLM": Encoder(
            "model",
            {
                **_LLAMA_NAMES,
                **_LLAMA_MLP,
                "embed": "{body}.embed_tokens",
                "blocks.ln1": "input_layernorm",
                "blocks.ln2": "post_attention_layernorm",
                "ln_final": "{body}.norm",
                "unembed": "lm_head",
            },
            pre_ln=True,
            gated=True,
        ),
        "MegatronBertForMaskedLM": Encoder(
            "bert", {"blocks.ln1": "attention.ln", "blocks.ln2": "ln", "ln_final": "{body}.encoder.ln"}, pre_ln=True
        ),
        "RobertaPreLayerNormForMaskedLM": Encoder(
            "roberta_prelayernorm",
            {
                **_ROBERTA_HEAD,
                "blocks.ln1": "attention.LayerNorm",
                "blocks.ln2": "intermediate.LayerNorm",
                "ln_final": "{body}.LayerNorm",
            },
            pre_ln=True,
        ),
        "XLMRobertaXLForMaskedLM": Encoder(
            "roberta",
            {
                **_ROBERTA_HEAD,
                "blocks.ln1": "attention.self_attn_layer_norm",
                "blocks.ln2": "LayerNorm",
                "ln_final": "{body}.encoder.LayerNorm",
            },
            pre_ln=True,
        ),
        "EsmForMaskedLM": Encoder(
            "esm",
            {
                **_ROBERTA_HEAD,
                "blocks.ln1": "attention.LayerNorm",
                "blocks.ln2": "LayerNorm",
                "ln_final": "{body}.encoder.emb_layer_norm_after",
            },
            pre_ln=True,
        ),
        "DebertaForMaskedLM": Encoder(
            "deberta",
            {f"blocks.attn.{part}": f"self.in_proj.{part}" for part in ("q", "k", "v")},
            prepare=prepare_deberta,
        ),
        "DebertaV2ForMaskedLM": Encoder("deberta", _DEBERTA_V2, prepare=prepare_deberta_v2),
    }
)

_VIT, _MASKED = ImageNames(), ImageNames(all_patches=True)
_DINOV2 = ImageNames("encoder.layer", ("norm1", "norm2"), ("layer_scale1", "layer_scale2"))
# Encoders alone, of models that have a decoder too, and without a head.
T5_ENCODERS = ("T5EncoderModel", "MT5EncoderModel")
# Models of images, by the class that they were saved as; those that TransformerLens has an adapter for keep it.
IMAGES: Mapping[str, ImageNames] = MappingProxyType(
    {
        "ViTModel": _VIT,
        "ViTForImageClassification": _VIT,
        "DeiTModel": _VIT,
        "DeiTForImageClassification": _VIT,
        "DeiTForImageClassificationWithTeacher": _VIT,
        "Dinov2Model": _DINOV2,
        "Dinov2ForImageClassification": _DINOV2,
        "Dinov2WithRegistersModel": _DINOV2,
        "Dinov2WithRegistersForImageClassification": _DINOV2,
        "ViTMAEModel": _MASKED,
        "ViTMAEForPreTraining": _MASKED,
    }
)
# What TransformerLens' own adapter of an architecture gets wrong, mended.
MENDED: Mapping[str, Callable[[type], type]] = MappingProxyType(
    {
        "FalconForCausalLM": falcon_adapter,
        "GraniteMoeHybridForCausalLM": granite_hybrid_adapter,
        **dict.fromkeys(("CohereForCausalLM", "Cohere2ForCausalLM"), cohere_adapter),
        "XGLMForCausalLM": xglm_adapter,
        "NemotronHForCausalLM": with_attention("model.layers", "mixer", {}),
        "RecurrentGemmaForCausalLM": with_attention(
            "model.layers", "temporal_block", {"ln1": "temporal_pre_norm", "ln2": "channel_pre_norm"}
        ),
    }
)
