"""The commands of `lig-lens`."""
