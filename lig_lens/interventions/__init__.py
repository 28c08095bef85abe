"""What interventions do to a metric, and how well scores foretell it."""
