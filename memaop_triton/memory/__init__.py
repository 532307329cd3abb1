"""What a layer remembers between steps: rows, or subspaces."""
