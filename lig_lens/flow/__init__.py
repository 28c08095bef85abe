"""Labelled results and what is derived from them; they know no model."""
