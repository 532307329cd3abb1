"""Turns the GPU benchmarks' JSON into bench/results/<gpu>/: a Markdown table and the JSON itself.

Usage: python -m bench.gpu_report BENCHMARK.json
"""

import json
import re
import shutil
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
HEAD = (
    "case", "dense ms", "ours ms", "ratio", "[q1, q3]", "limit ms", "of limit", "peak MiB",
)  # fmt: skip


def folder_name(gpu: str) -> str:
    """A GPU's name as a folder's: "NVIDIA H100 80GB HBM3" becomes "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def markdown(benchmarks: list[dict]) -> str:
    """The report of one run on one GPU."""
    first = benchmarks[0]["extra_info"]
    lines = [
        f"# {first['gpu']}",
        "",
        f"torch {first['torch']}, {first['processors']} processors. Medians of calls timed by "
        "events with a cold second-level cache, dense (cuBLAS) and ours in turn; bfloat16. *limit* "
        "is a GEMM of K rows that lie together plus one pass over what the path has to touch.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|---|" + "---:|" * (len(HEAD) - 1),
    ]
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        ratio, limit = info["ratio"], info["limit_ms"]
        cells = (
            info["name"],
            f"{info['baseline_ms']:.3f}",
            f"{info['ours_ms']:.3f}",
            f"{ratio['median']:.2f}",
            f"[{ratio['q1']:.2f}, {ratio['q3']:.2f}]",
            f"{limit:.3f}" if limit else "",
            f"{limit / info['ours_ms']:.2f}" if limit else "",
            f"{info['peak_bytes'] / 2**20:.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(path: Path) -> None:
    """Write the report of the benchmarks in `path`, if a GPU was there to run them."""
    text = path.read_text() if path.exists() else ""
    benchmarks = json.loads(text)["benchmarks"] if text else []
    if not benchmarks:
        print("No GPU was found: nothing was measured, and no report is written.")
        return
    folder = RESULTS / folder_name(benchmarks[0]["extra_info"]["gpu"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(markdown(benchmarks))
    shutil.copy(path, folder / "benchmark.json")
    print(f"Written: {folder / 'report.md'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
