"""The test of the tests: a fault planted in a kernel of the library is found by its own checks.

A fault is a piece of the kernel's source and what stands there instead. What runs is that source,
compiled anew, under the launchers and the checks as they are. Threads of one program are not told
apart: a `tl.debug_barrier` that is missing would not be found.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import triton

from memaop_triton.kernels.gpu import (
    orthonormal,
    pack,
    select,
    select_shared,
    selection_keys,
    stash,
    stash_restore,
    sums,
    variance_curve,
)
from tests.curve_checks import check_curves
from tests.judging import drawn_blocks
from tests.kernel_checks import check_packed, check_whole_gradient
from tests.orthonormal_checks import check_product
from tests.selecting import check_bernoulli, check_selection, share_among_programs
from tests.stash_checks import check_rounded

pytestmark = pytest.mark.parametrize("gpu", [80], indirect=True, ids=["sm_80"])


def plant(monkeypatch, folder, module, text, instead):
    """Give a module the kernels of its source with `instead` in the place of `text`."""
    source = Path(module.__file__).read_text("utf-8")
    assert source.count(text) == 1, f"{module.__name__} must have this once: {text}"
    compile_anew(monkeypatch, folder, module, source.replace(text, instead))


def compile_anew(monkeypatch, folder, module, source=None):
    """Give a module the kernels of a source, its own for `None`, with what it imports by now."""
    source = Path(module.__file__).read_text("utf-8") if source is None else source
    path = folder / f"{module.__name__}.py"
    path.write_text(source, "utf-8")  # Triton reads a function's source from its file
    names = {"__name__": module.__name__}
    exec(compile(source, path, "exec", dont_inherit=True), names)
    for name, value in names.items():
        if isinstance(value, triton.JITFunction):
            monkeypatch.setattr(module, name, value)


def packed(rows, indices):
    dtype = torch.bfloat16
    check_packed((rows, 33, 300), indices, dtype, dtype, signed=True, device="cuda")


CHECKS = {
    "rows": lambda: packed(61, torch.randperm(61)[:50].sort().values),
    "blocks": lambda: packed(70, drawn_blocks([1, 4], 16)),
    "basis": partial(check_product, "rank r/2", (150, 10), device="cuda"),
    "basis of one row": partial(check_product, "one row", (70, 33), device="cuda"),
    "curves": partial(check_curves, 45, 6, torch.bfloat16, device="cuda"),
    "parts": partial(check_whole_gradient, 30, torch.bfloat16, split=2, device="cuda"),
    "selection": partial(check_selection, "priority", device="cuda"),
    "selection among ties": partial(check_selection, "topk", device="cuda"),
    "selection of blocks": partial(check_selection, "priority", 4, device="cuda"),
    "draws": partial(check_bernoulli, device="cuda"),
    "stash": partial(check_rounded, (40, 75), 4, torch.bfloat16, "padded", rank=3, device="cuda"),
    "stash in C": partial(check_rounded, (9, 75), 8, torch.float32, compare=True, device="cuda"),
    "stash of bytes": partial(check_rounded, (9, 75), 8, torch.bfloat16, device="cuda"),
}


class Fault(NamedTuple):
    """What is planted, the check that finds it, and what the sanitizer says.

    It names the kind, and the kernel's argument that is concerned. A wrong value has no kind: the
    check fails by itself.
    """

    module: object
    text: str
    instead: str
    check: str
    kind: str | None = None
    tensor: str = ""


FAULTS = {
    "stash_kernel": [
        Fault(
            stash,
            "start = x_ptr + tl.minimum(rows, M - 1).to(tl.int64) * x_row",
            "start = x_ptr + (rows + 8).to(tl.int64) * x_row",
            "stash", "oob_read", "x_ptr",
        ),
        Fault(
            stash,
            "tl.store(norms_ptr + rows, tl.sqrt(square), mask=row_ok)",
            "tl.store(norms_ptr + rows, tl.sqrt(square))",
            "stash", "oob_write", "norms_ptr",
        ),
        Fault(
            stash,
            "has_lower = has_lower & (lower != NO_COLUMN)[None, :]",
            "has_lower = has_lower & (lower >= 0)[None, :]",
            "stash of bytes", "oob_write", "numbers_ptr",
        ),
        Fault(stash, "words >> 16, BITS", "words & 0xFFFF, BITS", "stash in C"),
        Fault(stash, "high = (left - right) * 0.125", "high = (right - left) * 0.125", "stash"),
        Fault(stash, "before = tl.where(mine, count, before)", "before += 0", "stash in C"),
        Fault(stash, "high = tl.where(has_upper, high, 0)", "high = high", "stash"),
    ],
    "restore_kernel": [
        Fault(
            stash_restore,
            "exists = wanted & (rows < M)",
            "exists = wanted & (rows < M + 1)",
            "stash", "oob_read", "z_ptr",
        ),
        Fault(stash_restore, "rotated(low - high, signs)", "rotated(low + high, signs)", "stash"),
        Fault(stash_restore, "dither_of(words >> 16)", "dither_of(words & 0xFFFF)", "stash"),
        Fault(stash_restore, "g.to(tl.float32) * weight[:, None]", "g.to(tl.float32)", "stash"),
        Fault(stash_restore, "(packed >> 4).to(tl.int8) - 8", "(packed >> 4).to(tl.int8)", "stash"),
        Fault(stash_restore, "value = tl.dot(z, e, value, ", "value = tl.dot(z, e, ", "stash"),
    ],
    "pack_kernel": [
        Fault(
            pack,
            "rows = tl.load(index_ptr + place, mask=place < K, other=M)",
            "rows = tl.load(index_ptr + place)",
            "rows", "oob_read", "index_ptr",
        ),
        Fault(
            pack,
            "a = tl.load(a_places, mask=wanted & exists[:, None], other=0)",
            "a = tl.load(a_places, mask=wanted, other=0)",
            "blocks", "oob_read", "x_ptr",
        ),
        Fault(
            pack,
            "tl.store(out_places, value.to(a.dtype), mask=wanted)",
            "tl.store(out_places, value.to(a.dtype), mask=(columns < count)[None, :])",
            "rows", "oob_write", "px_ptr",
        ),
        Fault(
            pack,
            "* count)[:, None] + columns[None, :]",
            "* count)[:, None] + (columns % COLUMNS)[None, :]",
            "rows", "race",  # of either matrix
        ),
        Fault(pack, "mask=wanted & carried[:, None], other=0)", "mask=wanted, other=0)", "rows"),
        Fault(pack, "factor[:, None] * m.to(tl.float32)", "m.to(tl.float32)", "rows"),
    ],
    "gram_kernel": [
        Fault(
            orthonormal,
            "mask=(n < N)[:, None] & (r < rank)[None, :], other=0)",
            "mask=(r < rank)[None, :], other=0)",
            "basis", "oob_read", "p_ptr",
        ),
        Fault(
            orthonormal,
            "tl.store(peaks_ptr + share * RANK + r, peak)",
            "tl.store(peaks_ptr + (share + 1) * RANK + r, peak)",
            "basis", "oob_write", "peaks_ptr",
        ),
        Fault(
            orthonormal,
            "places = parts_ptr + share * RANK * RANK",
            "places = parts_ptr",
            "basis", "race", "parts_ptr",
        ),
        Fault(orthonormal, " & 0x7FFFFFFF, axis=0)", ", axis=0)", "basis of one row"),
    ],
    "round_kernel": [
        Fault(
            orthonormal,
            "n = first + tl.arange(0, BLOCK)\n",
            "n = first + BLOCK + tl.arange(0, BLOCK)\n",
            "basis", "race", "out_ptr",
        ),
        Fault(
            orthonormal,
            "inside = (n < N)[:, None] & (r < rank)[None, :]",
            "inside = (n < N + BLOCK)[:, None] & (r < rank)[None, :]",
            "basis", "oob_write", "out_ptr",
        ),
        Fault(
            orthonormal,
            "places = next_ptr + share * RANK * RANK",
            "places = parts_ptr + share * RANK * RANK",
            "basis", "race", "parts_ptr",
        ),
        Fault(orthonormal, "unit / tl.sqrt(pivots)[:, None]", "unit", "basis"),
        Fault(orthonormal, "random * lost[None, :]", "random * 0", "basis of one row"),
    ],
    "variance_curve_kernel": [
        Fault(
            variance_curve,
            "rest = tl.load(rest_ptr + row, mask=inside, other=0)",
            "rest = tl.load(rest_ptr + row)",
            "curves", "oob_read", "rest_ptr",
        ),
        Fault(
            variance_curve,
            "curves_ptr += program * 2 * POINTS",
            "curves_ptr += program * POINTS",
            "curves", "race", "curves_ptr",
        ),
        Fault(
            variance_curve,
            "curves_ptr += program * 2 * POINTS",
            "curves_ptr += (program + 1) * 2 * POINTS",
            "curves", "oob_write", "curves_ptr",
        ),
        Fault(variance_curve, "tl.maximum(at - score, 0)", "(at - score)", "curves"),
        Fault(variance_curve, "first + program * STEP, rank)", "first + program, rank)", "curves"),
    ],
    "add_up_kernel": [
        Fault(
            sums,
            "total -= tl.load(minus_ptr, mask=inside, other=0)",
            "total -= tl.load(minus_ptr)",
            "parts", "oob_read", "minus_ptr",
        ),
        Fault(
            sums,
            "tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=inside)",
            "tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty))",
            "parts", "oob_write", "out_ptr",
        ),
        Fault(sums, "minus_ptr += count", "minus_ptr += 0", "parts"),
    ],
    "select_kernel": [
        Fault(
            select,
            "held = tl.load(keys_ptr + all_units, mask=all_units < units, other=-1)",
            "held = tl.load(keys_ptr + all_units)",
            "selection", "oob_read", "keys_ptr",
        ),
        Fault(
            selection_keys,
            "mask=inside[:, None] & (rows < M), other=0)",
            "mask=inside[:, None], other=0)",
            "selection of blocks", "oob_read", "scores_ptr",
        ),
        Fault(
            selection_keys,
            "tl.store(taken_ptr + rows, row_taken.to(tl.int8), mask=exists)",
            "tl.store(taken_ptr + rows, row_taken.to(tl.int8))",
            "selection", "oob_write", "taken_ptr",
        ),
        Fault(
            select,
            "quota = K - tl.sum((held > threshold).to(tl.int32), 0)",
            "quota = K",
            "selection", "oob_write", "indices_ptr",
        ),
        Fault(
            select,
            "_ranked_key(held, tl.minimum(K + 1, units))",
            "_ranked_key(held, K)",
            "selection",
        ),
    ],
    "slope_kernel": [
        Fault(
            select,
            "unit_scores(scores_ptr, each, each < units, M, BLOCK_ROWS)",
            "unit_scores(scores_ptr, each, each >= 0, M, BLOCK_ROWS)",
            "draws", "oob_read", "scores_ptr",
        ),
        Fault(select, "left = tl.maximum(K - certain, 0)", "left = tl.maximum(K, 0)", "draws"),
    ],
}  # fmt: skip
# With the units shared among several programs.
SHARED_FAULTS = {
    "digit_kernel": [
        Fault(
            select_shared,
            "place = (DIGIT * programs + program) * 256",
            "place = ((DIGIT - 1) * programs + program) * 256",
            "selection", "race", "counts_ptr",
        ),
    ],
    "count_kernel": [
        Fault(
            select_shared,
            "keys = tl.load(keys_ptr + each, mask=each < units, other=-1)",
            "keys = tl.load(keys_ptr + each)",
            "selection", "oob_read", "keys_ptr",
        ),
        Fault(
            select_shared,
            "tl.store(totals_ptr + programs + program, equal)",
            "tl.store(totals_ptr + 2 * programs + program, equal)",
            "selection", "oob_write", "totals_ptr",
        ),
    ],
    "compact_kernel": [
        Fault(
            select_shared,
            "above = tl.sum(tl.load(totals_ptr + others, mask=others < program, other=0), 0)",
            "above = 0",
            "selection", "race",  # of indices and weights alike
        ),
        Fault(
            select_shared,
            "quota = K - (tl.minimum(K + 1, units) - tl.load(state_ptr + 9))",
            "quota = 0",
            "selection among ties",
        ),
    ],
}  # fmt: skip


def planted(faults):
    cases = [(kernel, fault) for kernel, those in faults.items() for fault in those]
    names = [f"{kernel}: {fault.instead.strip()}" for kernel, fault in cases]
    return pytest.mark.parametrize(("kernel", "fault"), cases, ids=names)


def finds(gpu, kernel, fault):
    if fault.kind is None:
        with pytest.raises(AssertionError):
            CHECKS[fault.check]()
    else:
        with gpu.caught(fault.kind, kernel=kernel, tensor=fault.tensor):
            CHECKS[fault.check]()


@planted(FAULTS)
def test_faults(gpu, kernel, fault, monkeypatch, tmp_path):
    plant(monkeypatch, tmp_path, fault.module, fault.text, fault.instead)
    if fault.module is selection_keys:
        compile_anew(monkeypatch, tmp_path, select)
    finds(gpu, kernel, fault)


@planted(SHARED_FAULTS)
def test_faults_of_several_programs(gpu, kernel, fault, monkeypatch, tmp_path):
    plant(monkeypatch, tmp_path, fault.module, fault.text, fault.instead)
    share_among_programs(monkeypatch)
    finds(gpu, kernel, fault)


@pytest.mark.parametrize("check", CHECKS)
def test_without_a_fault(check, monkeypatch, tmp_path):
    stashes = stash, stash_restore
    selections = selection_keys, select_shared, select
    for module in (pack, orthonormal, variance_curve, sums, *stashes, *selections):
        compile_anew(monkeypatch, tmp_path, module)
    CHECKS[check]()


def test_what_is_replaced_must_be_there(gpu, monkeypatch, tmp_path):
    CHECKS["blocks"]()
    for text in ("no longer there", "tl.load("):
        with pytest.raises(AssertionError, match="must have this once"):
            plant(monkeypatch, tmp_path, pack, text, "")
