"""Targets: what is measured along a path, a destination's movement or a metric of the logits. Loads no torch.

A target that has a name is a file here, and a line below; others, such as `direction(w)`, are made by their function.
"""

from lig_lens.registry import Entry, Registry

TARGETS = Registry("target", l2=Entry("lig_lens.targets.l2:L2"))
