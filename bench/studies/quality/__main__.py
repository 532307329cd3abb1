"""`python -m bench.studies.quality`."""

from __future__ import annotations

from memaop_triton.bench.studies.quality.commands import main

if __name__ == "__main__":
    main()
