"""The performance report: from the benchmarks' JSON file to an HTML page and Markdown.

`data` reads the file, `analysis` and `findings` interpret the numbers, `sections` and `sweeps`
arrange that with `tables` and `charts` into a `document`, and `writing` writes it out.
"""

from __future__ import annotations

from pathlib import Path

from memaop_triton.bench.report import writing
from memaop_triton.bench.report.data import load
from memaop_triton.bench.report.sections import document


def write(json_path: Path, output: Path) -> list[Path]:
    """Write the report of a run as HTML and Markdown to `output`; return the two paths.

    Args:
        json_path: What a suite left behind; its stem names the suite on the page, and the files.
        output: A folder; it is made if it is not there.

    Raises:
        ReportError: The file cannot be read, or holds something else than the benchmarks write.
        OSError: `output` cannot be written.
    """
    return writing.write(document(load(json_path)), output, json_path.stem)
