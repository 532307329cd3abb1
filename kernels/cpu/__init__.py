"""The steps on a CPU: plain PyTorch, and C."""
