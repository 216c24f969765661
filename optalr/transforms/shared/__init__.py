"""What several methods use: a bound on steps, parts of a tree, following a direction."""
