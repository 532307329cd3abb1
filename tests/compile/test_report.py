"""The kernel report says what the compiler says."""

import pytest
import triton

from bench.microscope.kernel_report import PAGE, keys, page, version_of_page
from bench.microscope.report import table


def test_the_committed_report_is_what_would_be_written_now(builder):
    if version_of_page() != triton.__version__:
        pytest.skip(f"written with Triton {version_of_page()}, this is {triton.__version__}")
    builder.start(keys())
    assert page(builder) == PAGE.read_text(encoding="utf-8"), "run `make kernel-report`"


def test_table():
    text = table(("kernel", "loop"), [("gather", "100")])
    assert text == "| kernel | loop |\n|---|---:|\n| gather | 100 |"
