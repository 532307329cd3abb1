"""Writes the report of results that are there already.

Usage: python -m memaop_triton.bench.report RESULTS.json [EARLIER.json] --output FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

from memaop_triton.bench.report import ReportError, write


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m memaop_triton.bench.report")
    parser.add_argument("results", type=Path, help="what a suite of benchmarks left behind")
    parser.add_argument("earlier", type=Path, nargs="?", help="an earlier run to compare with")
    parser.add_argument("--output", type=Path, required=True, help="folder for the two files")
    options = parser.parse_args()
    results: Path = options.results
    try:
        report = write(results, options.output, name=results.stem, compare=options.earlier)
    except (ReportError, OSError) as error:
        parser.error(str(error))
    print(f"wrote {report.html}\nwrote {report.markdown}")


if __name__ == "__main__":
    main()
