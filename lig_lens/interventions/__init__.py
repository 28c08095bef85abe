"""What interventions do to a metric, and how well scores foretell it."""

from lig_lens.interventions import patching as patching
