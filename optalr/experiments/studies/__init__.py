"""Several runs together: comparisons, tuning, theory."""
