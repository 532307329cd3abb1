"""What sampling does to a model's gradients, observed, and ratios chosen by it."""
