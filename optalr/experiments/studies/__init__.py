"""Several runs together: comparisons, tuning, a rate's range, theory."""
