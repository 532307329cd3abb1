"""What the choice of a kernel's configuration may depend on, and the name it is remembered by."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

KERNELS = (
    "row_scores",
    "accumulate_and_score",
    "project",
    "transposed_mm",
    "gather_gemm",
    "residual_gemm",
)
FLAGS = ("accumulate", "atomic", "blocks", "norms", "sums", "uneven", "unscored", "weighted")


@dataclass(frozen=True)
class Problem:
    """One launch of a kernel, as far as its configuration depends on it.

    Attributes:
        kernel: One of `KERNELS`.
        dtype: Of X and G.
        rows: M, number of rows of X and G.
        k: Number of rows that are multiplied; M for a pass over all rows.
        n: Columns of X (of the operand, for a pass over one).
        p: Columns of G; 0 for a pass over one operand.
        rank: Columns of the subspace's basis; 0 for none.
        stored: Dtype of the row memory, `None` without one.
        precision: How float32 products are formed, "ieee" or "tf32".
        flags: What else the kernel is specialised for, in alphabetical order: "accumulate",
            "atomic" (parts of a split may be added by atomics), "blocks" (rows come in whole
            blocks, by descriptor), "norms", "sums", "uneven" (rows that are not aligned to 16
            bytes), "unscored", "weighted".
        block_rows: Rows of a block with "blocks", a bound of what one step takes; 1 otherwise.
    """

    kernel: str
    dtype: torch.dtype
    rows: int
    k: int
    n: int
    p: int
    rank: int = 0
    stored: torch.dtype | None = None
    precision: str = "ieee"
    flags: tuple[str, ...] = ()
    block_rows: int = 1

    def bucketed(self) -> Problem:
        """The same with M and K rounded up to powers of two: batches of like size share a config.

        K = M stays so.
        """
        rows = _power_of_two(self.rows)
        k = rows if self.k == self.rows else min(rows, _power_of_two(self.k))
        return replace(self, rows=rows, k=k)

    @property
    def is_aligned(self) -> bool:
        """Whether copies can be 16 bytes wide: rows start aligned, and columns come in sixteens.

        Tiles that are copied by descriptor may be cut anywhere.
        """
        if "uneven" in self.flags:
            return False
        return "blocks" in self.flags or self.n % 16 == self.p % 16 == 0

    @property
    def key(self) -> str:
        """All fields in one line, for the cache: "bfloat16 M=16384 K=2048 N=4096 P=4096 ..."."""
        words = [str(self.dtype).removeprefix("torch.")]
        words += [f"M={self.rows}", f"K={self.k}", f"N={self.n}", f"P={self.p}"]
        if self.rank:
            words.append(f"rank={self.rank}")
        if self.stored is not None:
            words.append(f"stored={str(self.stored).removeprefix('torch.')}")
        if self.dtype == torch.float32:
            words.append(self.precision)
        if self.block_rows > 1:
            words.append(f"block_rows={self.block_rows}")
        return " ".join([*words, *self.flags])


# A launch asks for its problem every time: for one that was met before this takes half a
# microsecond instead of two.
problem_of = functools.lru_cache(maxsize=4096)(Problem)


@functools.cache
def flags(**wanted: bool) -> tuple[str, ...]:
    """The flags that are wanted, as `Problem` has them: `flags(sums=True, norms=False)`.

    Raises:
        ValueError: One of them is not in `FLAGS`.
    """
    for name in wanted:
        if name not in FLAGS:
            raise ValueError(f"flag {name!r} is not one of {', '.join(FLAGS)}.")
    return tuple(sorted(name for name, is_wanted in wanted.items() if is_wanted))


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()
