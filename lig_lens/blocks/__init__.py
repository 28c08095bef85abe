"""What a block is, found once per model, and what one prompt puts there."""
