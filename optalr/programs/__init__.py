"""Programs: which compiled step runs next, decided on the host without waiting for the device.

``survey`` finds the clocks in a state, ``mirror`` keeps copies of them on the host, ``arguments``
splits what a step is called with, and ``train_step`` compiles one program for each kind of step.
"""
