"""What a file may lack, and what it must have."""

import re

import pytest

from memaop_triton.bench.report import write
from memaop_triton.bench.report.data import ReportError, load
from tests.bench.report import made
from tests.bench.report.made import markdown_tables


@pytest.mark.parametrize("kind", ["dw", "sweep_rows", "sweep_ratio", "sweep_width", "overhead"])
def test_a_single_case_of_any_kind_without_a_machine(written, kind):
    page, markdown = written([made.weight_grad(kind, 512, 64, 64, 1 / 8)], with_machine=False)
    assert "an unnamed machine" in page
    assert "Roofline, float32" not in page
    (line,) = re.findall("^Not measured in this run: (.*)$", markdown, re.M)
    assert {"What the machine allows", "Kernels"} <= set(line.rstrip(".").split(", "))
    assert len(markdown_tables(markdown)) > 2
    assert not re.search(r"\bnan\b", markdown.lower())


def test_gpu_results(written):
    case = made.weight_grad("dw", 16384, 4096, 4096, 1 / 8)
    case |= {"device": "cuda", "dtype": "bfloat16", "block_rows": 64}
    del case["methods"]["authors"]
    case["methods"]["triton-plain"] = made.method("triton-plain", "baseline", 1.5, 6.0)
    rates = {"gemm_gflops": {"bfloat16": 7e5}, "stream_gbs": 3e3, "triad_gbs": 2.8e3}
    gpu = made.machine(name="Example GPU", clocks="1980 MHz", **rates)
    page, markdown = written([case], gpu, name="nvidia-example")
    assert "Roofline, bfloat16" in page
    for said in (
        "bfloat16, blocks of 64",
        "memaop-triton bench --suite gpu",
        "triton-plain",
        "| memory | 3.00 TB/s read, 2.80 TB/s update |",
        "1980 MHz",
    ):
        assert said in markdown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "not what the benchmarks write.*line 1"),
        ("[]", "not what the benchmarks write"),
        ('{"benchmarks": [{"extra_info": {"kind": "dw"}}]}', "methods"),
        ('{"benchmarks": [{"extra_info": {"kind": "dw", "methods": {}}}]}', "title"),
        (
            '{"benchmarks": [], "datetime": "", "commit_info": {"id": "unversioned"}}',
            "no benchmark with results",
        ),
    ],
)
def test_files_that_hold_something_else(tmp_path, content, message):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ReportError, match=rf"x\.json .*{message}"):
        load(path)


def test_a_commit_is_named_where_there_is_one(tmp_path):
    content = made.results([made.weight_grad("dw", 64, 8, 8, 1 / 8)])
    assert load(made.save(tmp_path / "x.json", content)).commit == "eaf524b0f0f0"
    content["commit_info"]["id"] = "unversioned"
    path = made.save(tmp_path / "x.json", content)
    assert load(path).commit is None
    assert "| commit |" not in write(path, tmp_path)[1].read_text("utf-8")
