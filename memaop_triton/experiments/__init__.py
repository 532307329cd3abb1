"""What the command line runs: the demo, and the experiments of the paper (arXiv 2110.09164)."""
