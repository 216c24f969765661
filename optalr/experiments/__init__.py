"""Experiments: configs, data, models, the training loop, records, and the command line.

No other room touches disk, clock or printing. ``pip install "optalr[experiments]"`` installs what
this one needs.
"""
