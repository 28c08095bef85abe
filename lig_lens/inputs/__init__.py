"""What a forward pass takes: text or token ids, with labels of its positions; prompts of known tasks."""
