"""What is measured along a path: a destination's movement, or a metric of the logits."""
