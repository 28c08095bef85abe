"""Hooked models: loading them, and running one from any block on."""
