"""Linear algebra that is true without an optimizer: arrays or matvecs in, arrays out."""
