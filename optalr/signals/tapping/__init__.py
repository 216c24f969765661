"""From a plan to moments: evaluating the loss with taps at its layers."""
