"""Writes the report of results that are there already.

Usage: python -m memaop_triton.bench.report RESULTS.json --output FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

from memaop_triton.bench.report import write
from memaop_triton.bench.report.data import ReportError


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m memaop_triton.bench.report")
    parser.add_argument("results", type=Path, help="what a suite of benchmarks left behind")
    parser.add_argument("--output", type=Path, required=True, help="folder for the two files")
    options = parser.parse_args()
    try:
        paths = write(options.results, options.output)
    except (ReportError, OSError) as error:
        parser.error(str(error))
    for path in paths:
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
