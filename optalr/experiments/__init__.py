"""Experiments: configs, data, models, the training loop, records, and the command line.

This is the only room that touches disk, clock and printing; ``pip install "optalr[experiments]"``
installs what it needs.
"""
