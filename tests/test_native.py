"""The compiled row passes agree with plain PyTorch, and their absence changes nothing but time."""

import functools
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import weakref

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from memaop_triton import MemAOPConfig, new_memory, selection
from memaop_triton.kernels import cpu, native, native_build
from memaop_triton.weight_grad import weight_grad

needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None,
    reason="the row passes are compiled on Linux with a C compiler only",
)


PRODUCT = r"fn?m(?:add|sub)\d+p|mulp"
# dtype of the rows, and how far a product may be off
KINDS = [(torch.float32, 1e-4), (torch.float64, 1e-12), (torch.bfloat16, 2e-2)]


def assembly(source, kind, capability, folder):
    """What the compiler makes of a file for processors with these instructions."""
    flags = native_build.FLAGS + native_build.VECTOR_FLAGS.get(capability, [])
    listing = folder / "listing.s"
    file = native_build.HEADER.with_name(source)
    native_build.run(["cc", *flags, native_build.KINDS[kind], "-S", str(file), "-o", str(listing)])
    return listing.read_text()


@pytest.fixture
def plain(monkeypatch):
    """Switches the compiled row passes off from the moment it is called."""
    return lambda: monkeypatch.setattr(native, "_library", lambda: None)


@pytest.fixture
def fresh_library():
    """Forgets what was loaded, before and after."""
    native._compiled.cache_clear()
    yield native._library
    native._compiled.cache_clear()


def both(plain, call):
    compiled = call()
    plain()
    return compiled, call()


@needs_compiler
def test_a_machine_with_a_compiler_uses_it():
    assert native.is_compiled()


@pytest.mark.parametrize(("dtype", "off"), KINDS)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rank", [1, 4, 16, 20, 32, 40, 64, 65])
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (9, 80), (137, 96), (300, 272), (64, 17)])
def test_projections_agree_with_pytorch(plain, rows, columns, rank, threads, dtype, off):
    x = torch.randn(rows, columns).to(dtype)
    basis = torch.linalg.qr(torch.randn(max(rank, columns), rank)).Q[:columns].to(dtype)
    torch.set_num_threads(threads)
    try:
        z, norms = cpu.project_rows(x, basis)
        product, x_norms, sums = cpu.project_gradient(x, z, bias_grad=True)
        again = cpu.transposed_mm(z, x)
    finally:
        torch.set_num_threads(1)
    assert z.dtype == sums.dtype == dtype
    assert norms.dtype == x_norms.dtype == product.dtype == cpu.score_dtype(dtype)
    exact, exact_z = x.double(), z.double()
    scale = cpu.basis_scale(columns)
    near = functools.partial(torch.testing.assert_close, check_dtype=False)
    near(scale * exact_z, exact @ basis.double(), rtol=off, atol=10 * off)
    # Only what is rounded when it is stored is as coarse as the dtype.
    fine = min(off, 1e-4)
    near(x_norms, exact.norm(dim=1), rtol=fine, atol=fine)
    near(sums, exact.sum(0), rtol=off, atol=off)
    near(product, exact_z.T @ exact, rtol=fine, atol=10 * fine)
    near(again, product)
    left = exact.square().sum(1) - (scale * exact_z).square().sum(1)
    least = exact.square().sum(1) * torch.finfo(dtype).eps
    near(norms.double().square(), left.maximum(least), rtol=2 * off, atol=2 * off * columns)
    plain()
    near(cpu.project_rows(x, basis)[1].square(), norms.square(), rtol=off, atol=off * columns)


def test_room_lives_until_the_call_returns(monkeypatch):
    """Where it is too large to be kept, nobody else holds it."""
    references, alive = [], []

    class Library:
        def product_room_f32(self, *sizes):
            return 64

        def transposed_product_f32(self, *arguments):
            alive.append(references[-1]() is not None)

    def room_for(kind, numbers):
        room = torch.empty(numbers, dtype=torch.uint8)
        references.append(weakref.ref(room))
        return room

    monkeypatch.setattr(native, "_room_for", room_for)
    monkeypatch.setattr(native, "_library_for", lambda *operands: Library())
    native.transposed_mm(torch.randn(8, 4), torch.randn(8, 16))
    assert alive == [True]


@pytest.mark.parametrize("dtype", [dtype for dtype, _ in KINDS])
@pytest.mark.parametrize("rank", [4, 16, 40])
def test_what_a_basis_leaves_of_its_own_rows_is_rounding_and_never_nothing(rank, dtype):
    basis = torch.linalg.qr(torch.randn(96, rank, dtype=cpu.score_dtype(dtype))).Q.to(dtype)
    rows = torch.randn(50, rank, dtype=dtype) @ basis.t()
    rest = cpu.project_rows(rows, basis)[1] / cpu.row_norms(rows)
    least = torch.finfo(dtype).eps ** 0.5
    assert rest.min() >= 0.99 * least
    assert rest.max() <= (2 if dtype == torch.bfloat16 else 10) * least


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86 assembly")
@pytest.mark.parametrize("kind", ["f32", "f64"])  # others are widened on the stack before
@pytest.mark.parametrize("capability", [*native_build.VECTOR_FLAGS, "DEFAULT"])
def test_sums_stay_in_registers(tmp_path, capability, kind):
    listing = assembly("projection.c", kind, capability, tmp_path)
    spills = re.findall(r"mov[ua]?p[sd]\t.*\(%r[sb]p", listing)
    products = re.findall(PRODUCT, listing)
    assert len(products) > 100
    assert len(spills) < len(products) / 4


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86 assembly")
@pytest.mark.parametrize("kind", native_build.KINDS)
@pytest.mark.parametrize("capability", [*native_build.VECTOR_FLAGS, "DEFAULT"])
def test_the_loop_of_the_gemm_stores_nothing(tmp_path, capability, kind):
    listing = assembly("gather_gemm.c", kind, capability, tmp_path)
    loops = re.findall(r"^(\.L\d+):\n((?:\t.*\n)*?)\tj\w+\t\1\n", listing, re.MULTILINE)
    inner = [body for _, body in loops if len(re.findall(PRODUCT, body)) >= 12]
    assert inner
    for body in inner:
        assert not re.search(r"mov[ua]?p[sd]\t%[xyz]mm\d+, .*\(", body)


@needs_compiler
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_narrower_registers_give_the_same_numbers(tmp_path, capability):
    probe = (
        "import torch; from memaop_triton.kernels import cpu, native; assert native.is_compiled(); "
        "torch.manual_seed(0); x, q = torch.randn(75, 208), torch.randn(208, 40); "
        "z, norms = cpu.project_rows(x, q); gradient = cpu.project_gradient(x, z, bias_grad=True); "
        f"torch.save((z, norms, *gradient), {str(tmp_path / 'found')!r})"
    )
    environ = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), ATEN_CPU_CAPABILITY=capability)
    subprocess.run([sys.executable, "-c", probe], env=environ, check=True)
    torch.manual_seed(0)
    x, q = torch.randn(75, 208), torch.randn(208, 40)
    z, norms = cpu.project_rows(x, q)
    expected = (z, norms, *cpu.project_gradient(x, z, bias_grad=True))
    for found, wanted in zip(torch.load(tmp_path / "found"), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [dtype for dtype, _ in KINDS])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (17, 3), (3, 129), (600, 64)])
def test_accumulation_agrees_with_pytorch(plain, dtype, rows, columns):
    memory, x = torch.randn(2, rows, columns, dtype=dtype)
    carry = torch.randn(rows, dtype=cpu.score_dtype(dtype)) * (torch.arange(rows) % 3 > 0)
    copy = memory.clone()
    norms = cpu.accumulate_and_score(memory, x, carry)
    plain()
    torch.testing.assert_close(norms, cpu.accumulate_and_score(copy, x, carry))
    torch.testing.assert_close(memory, copy)


@needs_compiler
@pytest.mark.parametrize(("count", "k"), [(2, 1), (17, 16), (500, 3), (5000, 625)])
@pytest.mark.parametrize("kind", ["normal", "wide", "zeros", "infinite", "all infinite", "nan"])
def test_priority_selects_what_pytorch_selects(count, k, kind):
    scores = torch.rand(count)
    if kind == "wide":
        scores = (20 * torch.randn(count)).exp().clamp(max=1e30)
    elif kind == "zeros":
        scores[torch.rand(count) < 0.9] = 0
    elif kind != "normal":
        bad = torch.ones(count) if kind == "all infinite" else torch.rand(count) < 0.01
        scores[bad.bool()] = torch.nan if kind == "nan" else torch.inf
    draws = 1 - torch.rand(count)
    indices, weights = native.priority(scores, draws, k)
    assert (indices.diff() > 0).all()
    assert ((indices >= 0) & (indices < count)).all()
    theirs, their_weights = selection._priority(scores.nan_to_num(torch.inf, torch.inf), draws, k)
    order = theirs.argsort()
    # Rows of weight 0 fill up to K, and any of them will do.
    found, expected = weights > 0, their_weights[order] > 0
    assert torch.equal(indices[found], theirs[order][expected])
    assert torch.equal(weights[found], their_weights[order][expected])


@needs_compiler
def test_priority_takes_the_first_of_equal_keys():
    indices, weights = native.priority(torch.ones(9), torch.ones(9), 4)
    assert indices.tolist() == [0, 1, 2, 3]
    assert weights.tolist() == [1, 1, 1, 1]


@needs_compiler
@pytest.mark.parametrize(("count", "k"), [(2, 1), (17, 16), (500, 3), (5000, 625)])
def test_the_largest_scores_are_selected(count, k):
    scores = torch.rand(count)
    scores[torch.rand(count) < 0.1] = 0
    indices = native.largest(scores, k)
    assert torch.equal(scores[indices].sort().values, scores.topk(k).values.flip(0))
    assert (indices.diff() > 0).all()


@needs_compiler
def test_of_equal_scores_the_first_are_selected_and_nan_before_all():
    assert native.largest(torch.ones(9), 4).tolist() == [0, 1, 2, 3]
    scores = torch.tensor([1.0, torch.nan, 3.0, torch.inf, 0.0])
    assert native.largest(scores, 3).tolist() == [1, 2, 3]


@pytest.fixture
def own_gemm(monkeypatch):
    """The GEMM of `gather_gemm.c`, whether it is the faster one on this machine or not."""
    capability = torch.backends.cpu.get_cpu_capability()
    monkeypatch.setattr(native, "_GEMM_CAPABILITIES", (capability,))
    return native.gather_gemm


def gemm_operands(k, n, p, rank, dtype=torch.float32):
    rows = max(k, 1) + 40
    x, g = torch.randn(rows, n, dtype=dtype), torch.randn(rows, p, dtype=dtype)
    indices = torch.randperm(rows)[:k].sort().values
    wide = cpu.score_dtype(dtype)
    projection = None
    if rank:
        basis = torch.linalg.qr(torch.randn(n, n, dtype=wide)).Q[:, :rank].to(dtype)
        z = x @ basis
        projection = cpu.Projection(basis, z, z.to(wide).t() @ g.to(wide))
    return x, g, indices, torch.rand(k, dtype=wide) + 1, projection


@needs_compiler
@pytest.mark.parametrize(("dtype", "off"), KINDS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 16])
@pytest.mark.parametrize("k", [0, 1, 3, 255, 256, 257, 700])
@pytest.mark.parametrize(("n", "p"), [(16, 16), (17, 31), (96, 48), (130, 61), (64, 400)])
def test_the_gather_gemm_agrees_with_float64(own_gemm, n, p, k, rank, weighted, dtype, off):
    x, g, indices, weights, projection = gemm_operands(k, n, p, rank, dtype)
    weights = weights if weighted else None
    gx, gg = x[indices].double(), g[indices].double()
    if weighted:
        gg *= weights.double()[:, None]
    if rank:
        basis, z, zg = (a.double() for a in projection)
        gx -= z[indices] @ basis.t()
    exact = gg.t() @ gx + (zg.t() @ basis.t() if rank else 0)
    found = own_gemm(x, g, indices, weights, projection)
    assert found.dtype == dtype
    # All sums are taken before anything is rounded to bfloat16.
    off = torch.finfo(dtype).eps if dtype == torch.bfloat16 else off
    torch.testing.assert_close(found.double(), exact, rtol=off, atol=min(2 * off, 2e-4))
    turned = own_gemm(x, g, indices, weights, projection, transposed=True)
    assert turned.is_contiguous()
    assert torch.equal(turned, found.t())


@needs_compiler
@pytest.mark.parametrize("dtype", [dtype for dtype, _ in KINDS])
@pytest.mark.parametrize(("n", "p"), [(130, 61), (61, 130)])
def test_the_gather_gemm_rounds_alike_for_any_number_of_threads(own_gemm, n, p, dtype):
    operands = gemm_operands(700, n, p, 5, dtype)
    found = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        try:
            found.append(own_gemm(*operands))
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(found[0], other) for other in found[1:])


@needs_compiler
@pytest.mark.parametrize(("dtype", "off"), KINDS)
def test_the_gather_gemm_takes_rows_of_any_stride_and_repeats(own_gemm, dtype, off):
    x = torch.randn(50, 40, dtype=dtype)[:, 3:35]
    g = torch.randn(100, 90, dtype=dtype)[::2, 5:30]
    indices = torch.tensor([4, 4, 9, 49])
    found, exact = own_gemm(x, g, indices), g[indices].double().t() @ x[indices].double()
    torch.testing.assert_close(found.double(), exact, rtol=off, atol=off)


@pytest.mark.parametrize(("dtype", "off"), KINDS)
def test_rows_of_z_may_overlap(dtype, off):
    z, a = torch.randn(12, dtype=dtype).unfold(0, 4, 1), torch.randn(9, 32, dtype=dtype)
    product = cpu.transposed_mm(z, a)
    torch.testing.assert_close(product.double(), z.double().t() @ a.double(), rtol=off, atol=1e-4)


def test_the_default_device_is_nobodys_device():
    scores = torch.rand(40, device="cpu")
    torch.set_default_device("meta")
    try:
        indices = selection.select_rows(scores, 5, "topk").indices
    finally:
        torch.set_default_device(None)
    assert torch.equal(indices.sort().values, scores.topk(5).indices.sort().values)


@needs_compiler
@pytest.mark.parametrize("index", [-1, 30])
def test_the_gather_gemm_reads_nothing_outside(own_gemm, index):
    with pytest.raises(IndexError, match=r"indices must be in \[0, 30\)"):
        own_gemm(torch.randn(30, 16), torch.randn(30, 16), torch.tensor([0, index]))


@needs_compiler
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_gather_gemm_spoils_what_the_row_reaches_and_nothing_else(own_gemm, value):
    x, g, indices, weights, _ = gemm_operands(300, 50, 40, 0)
    x[indices[7], 49] = value
    found = own_gemm(x, g, indices, weights).isfinite()
    assert not found[:, 49].any()
    assert found[:, :49].all()


@needs_compiler
def test_the_gather_gemm_keeps_its_room_within_bounds(own_gemm, monkeypatch):
    native._kept.__dict__.clear()
    own_gemm(*gemm_operands(300, 64, 64, 0))
    kept = native._kept.room
    own_gemm(*gemm_operands(300, 32, 32, 0))
    assert native._kept.room is kept
    monkeypatch.setattr(native, "_MOST_KEPT", kept.numel())
    own_gemm(*gemm_operands(300, 512, 512, 0))
    assert native._kept.room is kept


@needs_compiler
def test_the_gather_gemm_leaves_other_dtypes_and_small_results_alone(own_gemm):
    indices = torch.arange(4)
    assert own_gemm(*torch.randn(2, 9, 16, dtype=torch.float16), indices) is None
    assert own_gemm(torch.randn(9, 16), torch.randn(9, 16).bfloat16(), indices) is None
    assert own_gemm(torch.randn(9, 15), torch.randn(9, 64), indices) is None


@needs_compiler
def test_empty_slots_are_not_read():
    memory = torch.full((4, 32), torch.nan)
    x = torch.randn(4, 32)
    norms = cpu.accumulate_and_score(memory, x, torch.zeros(4))
    assert torch.equal(memory, x)
    torch.testing.assert_close(norms, x.norm(dim=1))


@pytest.mark.parametrize("dtype", [dtype for dtype, _ in KINDS])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_show_in_every_norm(value, dtype):
    x = torch.randn(40, 32, dtype=dtype)
    x[[3, 39], [0, 31]] = value
    carry = torch.ones(40, dtype=cpu.score_dtype(dtype))
    norms = (
        cpu.row_norms(x),
        cpu.accumulate_and_score(torch.zeros_like(x), x, carry),
        cpu.project_rows(x, torch.eye(32, 4, dtype=dtype))[1],
        cpu.project_gradient(x, x.new_ones(40, 4))[1],
    )
    for result in norms:
        assert (~result.isfinite()).nonzero().flatten().tolist() == [3, 39]


def test_rows_may_overlap_or_be_negated_lazily():
    x = torch.randn(64)
    windows = x.as_strided((17, 48), (1, 1))
    torch.testing.assert_close(cpu.row_norms(windows), windows.clone().norm(dim=1))
    negated = torch._neg_view(torch.randn(8, 16))
    slots = torch.zeros(8, 16)
    cpu.accumulate_and_score(slots, negated, torch.ones(8))
    assert torch.equal(slots, negated)


@pytest.mark.parametrize("memory", ["none", "residual", "signed", "subspace"])
def test_a_step_is_the_same_without_the_compiled_passes(plain, memory):
    selection = "topk" if memory in ("residual", "signed") else "priority"
    config = MemAOPConfig(k=20, rank=4, selection=selection, memory=memory)
    x, g = torch.randn(200, 32), torch.randn(200, 48)

    def steps():
        torch.manual_seed(3)
        state = new_memory(config, 32, 48)
        return torch.stack([weight_grad(x, g, config, state) for _ in range(3)])

    compiled, torch_only = both(plain, steps)
    torch.testing.assert_close(compiled, torch_only, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_is_nobodys_dtype(dtype):
    config = MemAOPConfig(k=20, rank=4)
    x = torch.randn(200, 32)

    def step():
        generator = torch.Generator().manual_seed(0)
        return weight_grad(x, x, config, new_memory(config, 32, 32), generator=generator)

    expected = step()
    torch.set_default_dtype(dtype)
    try:
        found = step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_tensors_without_memory_of_their_own_are_left_to_pytorch():
    assert native.row_norms(TwoTensor(torch.randn(4, 16), torch.randn(4, 16))) is None
    seen = []
    torch.func.grad(lambda x: seen.append(native.row_norms(x)) or x.sum())(torch.randn(4, 16))
    assert seen == [None]


def test_sparse_or_transposed_rows_are_left_to_pytorch():
    transposed = torch.randn(32, 32).t()
    assert native.project(transposed, torch.randn(32, 16), 4.0) is None
    assert native.transposed_mm(torch.randn(32, 16), transposed) is None
    assert native.row_norms(transposed) is None
    assert native.row_norms(torch.eye(4).to_sparse()) is None


@needs_compiler
def test_the_default_setting_uses_them(monkeypatch):
    for name in ("_project_in_chunks", "_transposed_mm_in_chunks"):
        monkeypatch.setattr(cpu, name, lambda *_, name=name: pytest.fail(f"{name} was called"))
    config = MemAOPConfig(refresh_every=1)
    memory = new_memory(config, 64, 32)
    for _ in range(3):
        weight_grad(torch.randn(100, 64), torch.randn(100, 32), config, memory)


@pytest.mark.skipif(sys.platform != "linux", reason="nothing is compiled elsewhere")
def test_unknown_backend(fresh_library, monkeypatch):
    monkeypatch.setenv("MEMAOP_TRITON_BACKEND", "pytorch")
    with pytest.raises(ValueError, match="MEMAOP_TRITON_BACKEND='pytorch' is not one of 'torch'"):
        fresh_library()


@needs_compiler
def test_the_compiled_file_is_kept_and_used_again(fresh_library, monkeypatch, tmp_path):
    monkeypatch.setenv("MEMAOP_TRITON_CACHE_DIR", str(tmp_path))
    assert fresh_library() is not None
    (kept,) = (tmp_path / "native").iterdir()
    native._compiled.cache_clear()
    monkeypatch.setattr(native_build, "_compile", lambda *_: pytest.fail("compiled a second time"))
    assert fresh_library() is not None
    assert list((tmp_path / "native").iterdir()) == [kept]


@needs_compiler
def test_a_cache_that_cannot_be_written_costs_nothing_but_the_next_compilation(
    fresh_library, monkeypatch, tmp_path, caplog
):
    (tmp_path / "native").write_text("in the way")
    monkeypatch.setenv("MEMAOP_TRITON_CACHE_DIR", str(tmp_path))
    with caplog.at_level(logging.INFO):
        assert fresh_library() is not None
    assert "not kept in" in caplog.text


@needs_compiler
def test_a_broken_file_in_the_cache_falls_back(fresh_library, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("MEMAOP_TRITON_CACHE_DIR", str(tmp_path))
    assert fresh_library() is not None
    (kept,) = (tmp_path / "native").iterdir()
    # In a process of its own: the file is mapped into this one.
    kept.unlink()
    kept.write_bytes(b"not a library")
    probe = "from memaop_triton.kernels import native; print(native.is_compiled())"
    environ = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run(
        [sys.executable, "-c", probe], env=environ, capture_output=True, text=True
    )
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"PATH": "", "CC": ""}, "no C compiler"),
        ({"CC": "/nowhere/cc"}, "did not run"),
        ({"CC": "false"}, "failed"),
        ({"MEMAOP_TRITON_BACKEND": "torch"}, ""),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="nothing is compiled elsewhere")
def test_without_a_compiler_plain_pytorch_serves(
    fresh_library, monkeypatch, tmp_path, caplog, variables, reason
):
    monkeypatch.setenv("MEMAOP_TRITON_CACHE_DIR", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.INFO):
        assert not native.is_compiled()
    assert reason in caplog.text
    x = torch.randn(5, 16)
    torch.testing.assert_close(cpu.row_norms(x), x.norm(dim=1))


@pytest.mark.parametrize("memory", ["residual", "signed"])
def test_rows_that_are_not_finite_leave_no_trace_in_plain_pytorch(plain, memory):
    plain()
    config = MemAOPConfig(k=2, selection="topk", memory=memory)
    state = new_memory(config, 16, 8)
    x, g = torch.randn(20, 16), torch.randn(20, 8)
    spoilt = x.clone()
    spoilt[:5] = torch.inf
    weight_grad(spoilt, g, config, state)
    assert weight_grad(x, g, config, state).isfinite().all()
    assert state.x.isfinite().all()
