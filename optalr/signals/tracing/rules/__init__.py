"""What each primitive does to an array that looks at a parameter or at a layer's output."""
