"""Engines: nodes of a block and a path in, integrated contributions out."""
