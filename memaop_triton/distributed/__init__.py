"""Memories and gradients of many processes."""
