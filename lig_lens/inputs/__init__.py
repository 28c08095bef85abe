"""What a forward pass takes: text or token ids, or pixels, with labels of its positions; prompts of known tasks."""
