"""Stands before TransformerLens while a test runs that is marked `one_generation` (tests/conftest.py)."""

raise AssertionError(
    "A test marked one_generation needs TransformerLens: mark it each_generation too, so that it runs on each of them."
)
