"""What else foretells an intervention. The scores' names stand in `SCORED_BY` (`interventions/__init__.py`)."""

from lig_lens.interventions.scores.scoring import SCORES as SCORES
from lig_lens.interventions.scores.scoring import scores as scores
