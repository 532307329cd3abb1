"""What a layer keeps between steps: rows, or subspaces."""
