"""What the tests of the C code share."""

import shutil
import sys

import pytest
import torch

needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None,
    reason="the row passes are compiled on Linux with a C compiler only",
)
# dtype of the rows, and how far a product may be off
KINDS = [(torch.float32, 1e-4), (torch.float64, 1e-12), (torch.bfloat16, 2e-2)]
