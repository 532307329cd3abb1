"""The kernel report says what the compiler says."""

import re

import pytest
import triton

from bench.kernel_report import PAGE, keys, page
from bench.microscope.report import table


def test_the_committed_report_is_what_would_be_written_now(builder):
    committed = PAGE.read_text(encoding="utf-8")
    version = re.search(r"Compiled by Triton (\S+),", committed)[1]
    if version != triton.__version__:
        pytest.skip(f"the report was made with Triton {version}, this is {triton.__version__}")
    builder.start(keys())
    assert page(builder) == committed, "run `make kernel-report`"


def test_table():
    text = table(("kernel", "loop"), [("gather", "100")])
    assert text == "| kernel | loop |\n|---|---:|\n| gather | 100 |"
