"""Integrals along paths: nodes and errors, and the integrands by autograd and in closed form."""
