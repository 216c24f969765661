"""What a loss reveals on the way to its gradient: layer signals and curvature products."""
