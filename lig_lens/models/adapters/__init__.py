"""Families that TransformerLens' bridge does not take by itself, or not rightly: which adapter serves them, and how.

A family whose modules are those of another, under other names, is a line here. All of them are held against the plain
transformers model (`tests/test_families.py`).
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from lig_lens.models.adapters.cohere import cohere_adapter
from lig_lens.models.adapters.encoders import EncoderNames
from lig_lens.models.adapters.falcon import falcon_adapter
from lig_lens.models.adapters.granite_hybrid import granite_hybrid_adapter

# The class of transformers that a model was saved as -> the architecture that the bridge knows, with the same modules.
KIN: Mapping[str, str] = MappingProxyType(
    {
        "PhimoeForCausalLM": "PhiMoEForCausalLM",
        "MinistralForCausalLM": "MistralForCausalLM",
        "CwmForCausalLM": "MistralForCausalLM",
        "HeliumForCausalLM": "Ernie4_5ForCausalLM",  # rotates neighbouring dimensions
    }
)

_ROBERTA = EncoderNames("roberta", "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder")
# Encoders with BERT's layers: where theirs stand.
ENCODERS: Mapping[str, EncoderNames] = MappingProxyType(
    {
        **dict.fromkeys(("RobertaForMaskedLM", "XLMRobertaForMaskedLM", "CamembertForMaskedLM"), _ROBERTA),
        "ElectraForMaskedLM": EncoderNames(
            "electra", "generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head"
        ),
    }
)
# What a model says of its type, where the class that it was saved as is not among those above.
MODEL_TYPES: Mapping[str, str] = MappingProxyType(
    {
        "roberta": "RobertaForMaskedLM",
        "xlm-roberta": "XLMRobertaForMaskedLM",
        "camembert": "CamembertForMaskedLM",
        "electra": "ElectraForMaskedLM",
        "phimoe": "PhimoeForCausalLM",
        "ministral": "MinistralForCausalLM",
        "cwm": "CwmForCausalLM",
        "helium": "HeliumForCausalLM",
    }
)
# What TransformerLens' own adapter of an architecture gets wrong, mended.
MENDED: Mapping[str, Callable[[type], type]] = MappingProxyType(
    {
        "FalconForCausalLM": falcon_adapter,
        "GraniteMoeHybridForCausalLM": granite_hybrid_adapter,
        **dict.fromkeys(("CohereForCausalLM", "Cohere2ForCausalLM"), cohere_adapter),
    }
)
