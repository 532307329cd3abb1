"""What a backward pass computes: the weight gradient and the input gradient."""
