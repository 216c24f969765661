"""When training changes its rule: two stages, phase schedulers, SWATS."""
