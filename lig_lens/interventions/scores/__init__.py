"""What else foretells an intervention; the table of scores stands in `scoring`."""

from lig_lens.interventions.scores.scoring import SCORES as SCORES
from lig_lens.interventions.scores.scoring import scores as scores
