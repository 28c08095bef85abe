"""What explains a class: CA-LIG and its neighbours, and how faithful they are. Loads no torch.

A method is a file in this room and a line below.
"""

from lig_lens.registry import Entry, Registry

METHODS = Registry(
    "method",
    ca_lig=Entry("lig_lens.relevance.ca_lig:CaLig"),
    ig=Entry("lig_lens.relevance.ig:Ig"),
    ig_layers=Entry("lig_lens.relevance.ig_layers:IgLayers"),
    grad_x_input=Entry("lig_lens.relevance.grad_x_input:GradXInput"),
    attcat=Entry("lig_lens.relevance.attcat:AttCat"),
    chefer=Entry("lig_lens.relevance.chefer:Chefer"),
    rollout=Entry("lig_lens.relevance.rollout:Rollout"),
    flow=Entry("lig_lens.relevance.flow:Flow"),
    attention=Entry("lig_lens.relevance.attention:Attention"),
    random=Entry("lig_lens.relevance.random:Random"),
)
