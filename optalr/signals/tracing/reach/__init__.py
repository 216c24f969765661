"""What reaches what in a traced loss: which products are felt by it, and which see its data."""
