"""Which node contributes to which: attn, mlp, block."""
