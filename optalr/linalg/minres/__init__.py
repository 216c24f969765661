"""Solving with products only: MINRES on pytrees."""
