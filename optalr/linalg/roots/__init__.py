"""Inverse roots and eigenbases of stacks of symmetric matrices."""
