"""A loss and the arguments of one call: what is split, traced and handed on as ``Partial``s."""
