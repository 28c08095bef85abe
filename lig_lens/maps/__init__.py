"""Maps: which node contributes to which. Loads no torch."""

from lig_lens.registry import Entry, Registry

MAPS = Registry(
    "map",
    attn=Entry("lig_lens.maps.attn:Attn"),
    mlp=Entry("lig_lens.maps.mlp:Mlp"),
    block=Entry("lig_lens.maps.block:Block"),
)
