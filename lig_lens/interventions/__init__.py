"""What interventions do to a metric, and how well scores foretell it. Loads no torch.

An intervention, or a score, that users name is a class in this room and a line below. One without a name is run as it
is (`lig_lens.interventions.runner.intervene`).
"""

import importlib
from types import ModuleType

from lig_lens.registry import Entry, Registry

# What `patch` patches, by the node.
NODES = Registry(
    "node",
    hook_z=Entry("lig_lens.interventions.patches:HookZ"),
    resid_pre=Entry("lig_lens.interventions.patches:ResidPre"),
    resid_mid=Entry("lig_lens.interventions.patches:ResidMid"),
)
# What `ablate` replaces a head's outputs by.
ABLATED_BY = Registry(
    "ablation",
    mean=Entry("lig_lens.interventions.ablations:Mean"),
    resample=Entry("lig_lens.interventions.ablations:Resample"),
)
SCORED_BY = Registry(
    "score",
    attention=Entry("lig_lens.interventions.scores.patterns:Attention"),
    attention_value_norm=Entry("lig_lens.interventions.scores.patterns:AttentionValueNorm"),
    gradient_pattern=Entry("lig_lens.interventions.scores.gradients:GradientPattern"),
    attribution_patching=Entry("lig_lens.interventions.scores.gradients:AttributionPatching"),
)


def __getattr__(name: str) -> ModuleType:
    """Load `patching` on first use."""
    if name != "patching":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
