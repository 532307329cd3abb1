"""What sampling does to a model's gradients, and ratios that are chosen by it."""
