"""`python -m bench.quality`."""

from __future__ import annotations

from memaop_triton.bench.quality.commands import main

if __name__ == "__main__":
    main()
