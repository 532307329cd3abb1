"""The stage `gpu tests`: tests/gpu, every test a case.

Several processes share the tests, because compiling is most of their work.
"""

from __future__ import annotations

import importlib.util
import time
from typing import Any

from memaop_triton.bench.first_run import cases, records
from memaop_triton.bench.first_run.cases import RESTART, Place

_TESTS_FAILED, _NOTHING_COLLECTED = 1, 5
# A warning of versions that nobody has tried is no reason for every test to fail.
_OPTIONS = ("-q", "-rs", "-W", "default", "--continue-on-collection-errors")
_WITHOUT = ("cacheprovider", "xdist", "benchmark", "randomly")  # plugins, if they are there


def run(place: Place) -> int:
    """The tests of this process; what fails is kept, and is no reason to stop."""
    if importlib.util.find_spec("pytest") is None:
        reason = "pytest is not installed"
        records.write(place.folder, place.stage, "all", records.SKIPPED, reason=reason)
        return 0
    import pytest

    arguments = ["tests/gpu", *_OPTIONS]
    for plugin in _WITHOUT:
        arguments += ["-p", f"no:{plugin}"]
    status = int(pytest.main(arguments, plugins=[Recording(place)]))
    return 0 if status in (_TESTS_FAILED, _NOTHING_COLLECTED) else status


class Recording:
    """A plugin of pytest that keeps how each test ended, and runs none twice.

    Args:
        place: Whose share of the tests runs here.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.status = records.PASSED
        self.reason = ""
        self.start = 0.0

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Leave the tests of other processes and those that ended before this one began."""
        found = records.ended(records.read(self.place.folder), self.place.stage)
        known = {one["name"] for one in found}
        mine = (item for number, item in enumerate(items) if self.place.is_mine(number))
        items[:] = [item for item in mine if item.nodeid not in known]

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be imported is a case that failed, or one that is skipped."""
        if self.place.worker == 0 and report.outcome != records.PASSED and report.nodeid:
            self._note(report)
            cases.end(self.place, report.nodeid, self.status, 0.0, reason=self.reason)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Note that a test begins."""
        self.status, self.reason, self.start = records.PASSED, "", time.perf_counter()
        cases.begin(self.place, nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note what is not as it should be in any part of a test."""
        if report.outcome != records.PASSED and self.status != records.FAILED:
            self._note(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Note how a test ended, and leave a GPU that is not usable any more."""
        seconds = time.perf_counter() - self.start
        reason = {"reason": self.reason} if self.reason else {}
        cases.end(self.place, nodeid, self.status, seconds, **reason)
        if self.status == records.FAILED and not cases.is_usable(self.place.device):
            import pytest

            pytest.exit("the GPU is not usable any more", returncode=RESTART)

    def _note(self, report: Any) -> None:
        self.status = report.outcome
        if report.outcome == records.SKIPPED and isinstance(report.longrepr, tuple):
            self.reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        else:
            self.reason = str(report.longreprtext)[-cases.LONGEST_TEXT :]
