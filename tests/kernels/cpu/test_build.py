"""The compiled C code fits the machine, and its file is kept."""

import platform
import re
import sys

import pytest

from memaop_triton.kernels.cpu import build
from tests.compiled import needs_compiler
from tests.processes import run, run_python

PRODUCT = r"fn?m(?:add|sub)\d+p|mulp"


def assembly(source, kind, capability, folder):
    """What the compiler makes of a file for processors with these instructions."""
    flags = build.FLAGS + build.VECTOR_FLAGS.get(capability, [])
    listing = folder / "listing.s"
    file = build.HEADERS[0].with_name(source)
    build.run(["cc", *flags, build.KINDS[kind], "-S", str(file), "-o", str(listing)])
    return listing.read_text()


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86 assembly")
@pytest.mark.parametrize("kind", build.KINDS)
@pytest.mark.parametrize("capability", [*build.VECTOR_FLAGS, "DEFAULT"])
def test_sums_stay_in_registers(tmp_path, capability, kind):
    listing = assembly("gather_gemm.c", kind, capability, tmp_path)
    loops = re.findall(r"^(\.L\d+):\n((?:\t.*\n)*?)\tj\w+\t\1\n", listing, re.MULTILINE)
    inner = [body for _, body in loops if len(re.findall(PRODUCT, body)) >= 12]
    assert inner
    for body in inner:
        assert not re.search(r"mov[ua]?p[sd]\t%[xyz]mm\d+, .*\(", body)
    listing = assembly("projection.c", kind, capability, tmp_path)
    spills = re.findall(r"mov[ua]?p[sd]\t.*\(%r[sb]p", listing)
    products = re.findall(PRODUCT, listing)
    assert len(products) > 100
    if kind != "bf16":  # is widened on the stack before
        assert len(spills) < len(products) / 4


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86 assembly")
@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("capability", [*build.VECTOR_FLAGS, "DEFAULT"])
def test_several_rows_are_drawn_at_a_time(tmp_path, capability, kind):
    listing = assembly("selection.c", kind, capability, tmp_path)
    assert len(re.findall(r"pmul(?:ud|l)q\t", listing)) >= 4  # of two 32-bit factors, 64 bits
    assert re.search(r"divp[sd]\t", listing)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_narrower_registers_give_the_right_numbers(capability):
    wanted = [
        "-k",
        "projections or default_setting_uses_the_c_code or the_oracle_chooses",
        "tests/kernels/cpu",
    ]
    run(sys.executable, "-m", "pytest", "-q", "-n", "0", *wanted, ATEN_CPU_CAPABILITY=capability)


@needs_compiler
def test_a_broken_file_is_replaced_by_one_that_is_used_again(monkeypatch, tmp_path):
    monkeypatch.setenv("MEMAOP_TRITON_CACHE_DIR", str(tmp_path))
    kept = build.find_recipe().file
    kept.parent.mkdir()
    kept.write_bytes(b"not a library")
    build.load()
    assert kept.read_bytes() != b"not a library"
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled a second time"))
    build.load()
    assert list(kept.parent.iterdir()) == [kept]


@needs_compiler
def test_other_libraries_do_not_get_in_between(tmp_path):
    other, library = tmp_path / "other.c", tmp_path / "other.so"
    other.write_text("void row_norms_f32(void) {}\nvoid choose_f32(void) {}\n")
    build.run(["cc", "-shared", "-fPIC", str(other), "-o", str(library)])
    selected = run_python(
        f"import ctypes; ctypes.CDLL({str(library)!r}, mode=ctypes.RTLD_GLOBAL); "
        "import torch; from memaop_triton.kernels.cpu import native_step; a = torch.ones(9, 16); "
        "a[4:6] = 3; print(native_step.run(a, a, 2, draw=False).indices.tolist())"
    )
    assert selected == "[4, 5]"
