"""Maps: which node contributes to which. Loads no torch."""

from lig_lens.registry import Entry, Registry

MAPS = Registry(
    "map",
    attn=Entry("lig_lens.maps.from_resid:Attn"),
    mlp=Entry("lig_lens.maps.mlp:Mlp"),
    block=Entry("lig_lens.maps.from_resid:Block"),
)
# Contributions to a metric of the logits, instead of to a destination's vector.
METRIC_MAPS = Registry("map", attn=Entry("lig_lens.maps.to_metric:AttnToMetric"))
