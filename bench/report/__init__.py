"""The performance report: from the benchmarks' JSON file to an HTML page and Markdown.

`data` reads the file, `analysis`, `fits`, `findings` and `compare` say what the numbers mean,
`sections` arranges that with `tables` and `charts` into a `document`, and `writing` writes it out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from memaop_triton.bench.report import writing
from memaop_triton.bench.report.compare import Comparison
from memaop_triton.bench.report.compare import compare as compare_runs
from memaop_triton.bench.report.data import Run, load
from memaop_triton.bench.report.fields import ReportError
from memaop_triton.bench.report.sections import document

__all__ = ["Report", "ReportError", "write"]


@dataclass(frozen=True)
class Report:
    """A report that was written.

    Attributes:
        html: The page.
        markdown: The same tables for GitHub.
        run: What it is about.
        comparison: With an earlier run, if one was given.
    """

    html: Path
    markdown: Path
    run: Run
    comparison: Comparison | None

    def regressions(self, percent: float) -> list[str]:
        """The calls whose speed-up fell by more than `percent` since the earlier run, in words.

        A call counts if, besides, the quartiles of its two speed-ups do not overlap: a change
        within the spread of the rounds is no regression.

        Raises:
            ReportError: There is no earlier run to compare with.
        """
        if self.comparison is None:
            raise ReportError(f"percent={percent:g} of what? Name an earlier run to compare with.")
        return [str(change) for change in self.comparison.regressions(percent)]


def write(json_path: Path, output: Path, *, name: str, compare: Path | None = None) -> Report:
    """Write the report of a run to `output`/`name`.html and `output`/`name`.md.

    Args:
        json_path: What a suite left behind; its stem names the suite on the page.
        output: A folder; it is made if it is not there.
        name: Of the two files, without suffix.
        compare: The file of an earlier run.

    Raises:
        ReportError: A file cannot be read, or holds something else than the benchmarks write.
        OSError: `output` cannot be written.
    """
    run = load(json_path)
    comparison = None if compare is None else compare_runs(run, load(compare))
    html, markdown = writing.write(document(run, comparison), output, name)
    return Report(html, markdown, run, comparison)
