"""The layer, its place in autograd, and its state."""
