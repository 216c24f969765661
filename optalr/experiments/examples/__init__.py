"""Configs that the package ships, copies of those in the repository's `configs/digits`."""
