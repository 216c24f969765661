"""From a traced loss to a plan: which equations are layers, and what to tap."""
