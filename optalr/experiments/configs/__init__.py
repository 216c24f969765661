"""Configs: what a run is told, checked and turned into methods."""
