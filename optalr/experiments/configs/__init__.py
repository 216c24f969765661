"""Configs: what a run should do, checked and turned into methods and schedules."""
