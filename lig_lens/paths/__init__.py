"""Where a path of integration starts, and how a column is refilled."""
