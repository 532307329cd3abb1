"""What a file may lack, and what it must have."""

import math
import re

import pytest

from memaop_triton.bench.report import ReportError, write
from memaop_triton.bench.report.data import load
from tests.bench.report import made
from tests.bench.report.made import markdown_tables


def test_what_is_not_there_is_said(written):
    page, markdown = written([made.weight_grad("dw", 64, 8, 8, 1 / 8)], with_machine=False)
    assert "the machine's rates (no roofline)" in markdown
    assert "training steps" in markdown
    assert "Roofline, float32" not in page
    assert "an unnamed machine" in page


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("dw", "512×64×64"),
        ("sweep_rows", "a single size, so there is no fit"),
        ("sweep_ratio", "512×64×64: a single ratio, so there is no line to draw"),
        ("sweep_width", "a single width, so there is no line to draw"),
        ("overhead", "512×64×64"),
    ],
)
def test_a_single_case_of_any_kind(written, kind, said):
    page, markdown = written([made.weight_grad(kind, 512, 64, 64, 1 / 8)])
    assert said in page
    assert said in markdown
    assert not re.search(r"\bnan\b", markdown.lower())


def test_two_ratios_make_a_line(written):
    cases = [made.weight_grad("sweep_ratio", 512, 64, 64, r) for r in (1 / 8, 1 / 16)]
    assert 'aria-label="512×64×64, float32"' in written(cases)[0]


@pytest.mark.parametrize("ms", [math.nan, None, math.inf])
def test_a_time_that_is_no_number_is_left_out_and_named(written, ms):
    case = made.weight_grad("dw", 512, 64, 64, 1 / 8)
    case["methods"]["limit-default"]["ms"] = ms
    case["methods"]["wta-crs"]["ms"] = ms
    _, markdown = written([case])
    assert "Without a time in some case: limit-default, wta-crs." in markdown
    head, _, row = next(t for t in markdown_tables(markdown) if "default" in t[0])
    assert "wta-crs" not in head
    assert len(row) == len(head)


def test_gpu_results(written):
    case = made.weight_grad("dw", 16384, 4096, 4096, 1 / 8)
    case |= {"device": "cuda", "dtype": "bfloat16", "block_rows": 64}
    del case["methods"]["authors"]
    case["methods"]["triton-plain"] = made.method("triton-plain", "baseline", 1.5, 6.0)
    gpu = made.machine(
        name="Example GPU", threads=None, cores=None, gemm_gflops={"bfloat16": 7e5},
        stream_gbs=3e3, triad_gbs=2.8e3, clocks={"sm_mhz": 1980},
    )  # fmt: skip
    page, markdown = written([case], gpu, name="nvidia-example")
    assert "Roofline, bfloat16" in page
    assert "bfloat16, blocks of 64" in markdown
    assert "memaop-triton bench --suite gpu" in markdown
    assert "triton-plain" in markdown


def test_infos_of_other_benchmarks_are_passed_over(tmp_path):
    content = made.results([made.weight_grad("dw", 64, 8, 8, 1 / 8)])
    content["benchmarks"] += [{"name": "other", "extra_info": {}}, {"name": "bare"}]
    assert len(load(made.save(tmp_path / "x.json", content)).cases) == 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c.pop("title"), r"benchmarks\[1\].extra_info.title is missing: a string"),
        (lambda c: c.update(m="many"), r'extra_info.m is "many": a whole number'),
        (lambda c: c.update(n=0), r"extra_info.n is 0: a whole number from 1"),
        (lambda c: c.update(k=True), r"extra_info.k is true"),
        (lambda c: c.update(ratio=0), r"extra_info.ratio is 0: a number above 0"),
        (lambda c: c.update(kind="dX"), r"extra_info.kind is 'dX': one of kernel, dw"),
        (lambda c: c.update(methods=[]), r"extra_info.methods is \[\]: an object"),
        (lambda c: c["methods"]["topk"].update(role="us"), r"methods.topk.role is 'us'"),
        (lambda c: c["methods"]["topk"].pop("speedup"), r"methods.topk.speedup is missing"),
        (lambda c: c["methods"]["topk"].update(ms="1"), r'methods.topk.ms is "1": a number'),
        (lambda c: c.update(wanted={"topk": -1}), r"wanted.topk is -1: a number above 0"),
    ],
)
def test_errors_name_file_and_field(saved, tmp_path, spoil, message):
    case = made.weight_grad("dw", 512, 64, 64, 1 / 8)
    spoil(case)
    with pytest.raises(ReportError, match=rf"^cpu.json: ?.*{message}|^cpu.json\..*{message}"):
        write(saved([case]), tmp_path, name="x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "is not JSON"),
        ("[]", "an object is wanted"),
        ('{"benchmarks": []}', "no benchmark"),
    ],
)
def test_files_that_hold_something_else(tmp_path, content, message):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ReportError, match=message):
        load(path)
