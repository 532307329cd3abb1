"""The library decides: which layers sample their gradients, by what it measures."""
