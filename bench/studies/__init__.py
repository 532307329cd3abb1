"""Questions that take more than a benchmark."""
