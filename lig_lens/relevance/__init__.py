"""What explains a class: CA-LIG and its neighbours, and how faithful they are. Loads no torch.

A method is a file in this room and a line below.
"""

from lig_lens.registry import Entry, Registry

METHODS = Registry(
    "method",
    ca_lig=Entry("lig_lens.relevance.ca_lig:CaLig"),
)
