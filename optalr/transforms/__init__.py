"""One method family a file, each a composable optax transformation."""
