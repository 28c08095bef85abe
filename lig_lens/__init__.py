"""Layer-wise Integrated Gradients between the token vectors inside transformer blocks.

Names are resolved on first use, so that importing the package, or asking the command line for help, loads
no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "attribute": "attribution",
    "load_model": "loading",
    "describe_boundaries": "boundaries",
    "BlockBoundaries": "boundaries",
    "average": "averaging",
    "compare": "agreement",
    "compare_table": "agreement",
    "precision_recall": "agreement",
    "consistency_table": "compose",
    "direction": "targets",
    "Effects": "effects",
    "explore": "explorer",
    "induction_pairs": "induction",
    "scores": "scoring",
    "metric": "metrics",
    "logit_difference": "metrics",
    "log_probability": "metrics",
    "class_logit": "metrics",
    "kl_divergence": "metrics",
    "Flow": "flow",
    "LigLensError": "errors",
    "InputError": "errors",
    "BoundaryError": "errors",
    "NonFiniteError": "errors",
    "MissingPackageError": "errors",
    "FlowFileError": "errors",
    "ConvergenceWarning": "errors",
    "CancellationWarning": "errors",
}
_MODULES = ("patching",)
__all__ = ["__version__", *_HOMES, *_MODULES]

if TYPE_CHECKING:
    from lig_lens import patching as patching
    from lig_lens.agreement import compare as compare
    from lig_lens.agreement import compare_table as compare_table
    from lig_lens.agreement import precision_recall as precision_recall
    from lig_lens.attribution import attribute as attribute
    from lig_lens.averaging import average as average
    from lig_lens.boundaries import BlockBoundaries as BlockBoundaries
    from lig_lens.boundaries import describe_boundaries as describe_boundaries
    from lig_lens.compose import consistency_table as consistency_table
    from lig_lens.effects import Effects as Effects
    from lig_lens.errors import BoundaryError as BoundaryError
    from lig_lens.errors import CancellationWarning as CancellationWarning
    from lig_lens.errors import ConvergenceWarning as ConvergenceWarning
    from lig_lens.errors import FlowFileError as FlowFileError
    from lig_lens.errors import InputError as InputError
    from lig_lens.errors import LigLensError as LigLensError
    from lig_lens.errors import MissingPackageError as MissingPackageError
    from lig_lens.errors import NonFiniteError as NonFiniteError
    from lig_lens.explorer import explore as explore
    from lig_lens.flow import Flow as Flow
    from lig_lens.induction import induction_pairs as induction_pairs
    from lig_lens.loading import load_model as load_model
    from lig_lens.metrics import class_logit as class_logit
    from lig_lens.metrics import kl_divergence as kl_divergence
    from lig_lens.metrics import log_probability as log_probability
    from lig_lens.metrics import logit_difference as logit_difference
    from lig_lens.metrics import metric as metric
    from lig_lens.scoring import scores as scores
    from lig_lens.targets import direction as direction


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
