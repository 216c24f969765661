"""A learning rate that is learned from the loss along the step.

``transform`` is the method, ``probing`` takes a reading of the loss along the step, ``rate_rule``
answers it with a new rate, ``safeguards`` says what happens where that rule fails.
"""
