"""The experiment runner: the only room that touches disk, clock, data and printing."""
