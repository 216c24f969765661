"""The products that make a layer, and how to lay out the two sides of each."""
