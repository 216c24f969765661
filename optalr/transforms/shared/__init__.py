"""What several methods use: making transformations, bounds on steps, parts of a tree, lengths."""
