"""The rows that a convolution multiplies by its weight, without the matrix of them.

Row m of X belongs to one position of the output. It holds the inputs under the kernel there, *its*
patch, tap by tap and channel by channel: N = taps × channels columns, in the order of a weight in
the memory format `channels_last`. All of X is as many times larger than the inputs as the kernel
has taps per stride, so that only the rows that are asked for are gathered:

- Squared norms of patches are sums of the squared norms of positions under the kernel, by one pass
  over the inputs and a box filter over one number a position.
- X Q is a convolution with the columns of Q as filters, and Aᵀ X the gradient of the weight of one.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from memaop_triton import dispatch
from memaop_triton.kernels import targets
from memaop_triton.kernels.cpu import native, positions
from memaop_triton.kernels.cpu.picked import Picked
from memaop_triton.kernels.cpu.torch_ops import basis_scale, rest_beside
from memaop_triton.memory.maps import Maps, by_position, is_channels_last

_EPS_OF_TF32 = 2.0**-10


class Geometry(NamedTuple):
    """Where a convolution puts its kernel, with one number for each dimension of space.

    Attributes:
        kernel_size: Taps.
        stride: Between two positions of the output.
        padding: Zeros at either end.
        dilation: Between two taps.
        groups: Of channels, each with an output of its own.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def padded(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Positions of inputs of these sizes with their padding."""
        return tuple(n + 2 * pad for n, pad in zip(sizes, self.padding, strict=True))

    def positions(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Positions of the output, for inputs of these sizes."""
        every = zip(self.padded(sizes), self.kernel_size, self.stride, self.dilation, strict=True)
        return tuple((n - gap * (k - 1) - 1) // step + 1 for n, k, step, gap in every)

    @property
    def is_pointwise(self) -> bool:
        """Whether every patch is one position, and every position has one."""
        return (
            max(*self.kernel_size, *self.stride) == 1 and not any(self.padding) and self.groups == 1
        )


class Convolution(NamedTuple):
    """What one call of a convolution works on.

    Attributes:
        geometry: Where the kernel is put.
        inputs: Sizes of the inputs, [B, C, *sizes].
        is_channels_last: Whether the channels of a position are neighbours in memory.
    """

    geometry: Geometry
    inputs: tuple[int, ...]
    is_channels_last: bool


class Patches:
    """X of a convolution, [M, N], or one for each group of channels.

    Args:
        inputs: [B, C, *sizes], floating point.
        geometry: Of the convolution.

    Attributes:
        inputs: As given.
        geometry: As given.
        shape: [M, N], with M = B × positions of the output and N = taps × channels of a group.
    """

    def __init__(self, inputs: Tensor, geometry: Geometry) -> None:
        self.inputs = inputs
        self.geometry = geometry
        self._positions = geometry.positions(tuple(inputs.shape[2:]))
        channels = inputs.shape[1] // geometry.groups
        columns = math.prod(geometry.kernel_size) * channels
        self.shape = torch.Size((len(inputs) * math.prod(self._positions), columns))

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers."""
        return self.inputs.dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.inputs.device

    @property
    def groups(self) -> int:
        """Matrices of [M, N] side by side."""
        return self.geometry.groups

    @property
    def convolution(self) -> Convolution:
        """Whose rows they are."""
        inputs = self.inputs
        return Convolution(self.geometry, tuple(inputs.shape), is_channels_last(inputs))

    def matrix(self) -> Tensor:
        """All rows, [M, N], where each of them is one position: a view, or a copy of the inputs."""
        assert self.geometry.is_pointwise
        return by_position(self.inputs)

    @functools.cached_property
    def _laid_out(self) -> tuple[Tensor, Tensor]:
        """The inputs position after position, with the padding around them: [B, *padded, C].

        And the squared norms of a group's channels there, [B, *padded, groups] in `score_dtype`.
        """
        padding, groups = self.geometry.padding, self.groups
        is_copied = any(padding) or not is_channels_last(self.inputs)
        both = positions.lay_out(self.inputs, padding, groups) if is_copied else None
        if both is not None:
            return both
        padded = self._copied() if is_copied else self.inputs.movedim(1, -1)
        squares = dispatch.row_norms(padded.view(-1, padded.shape[-1] // groups)).square_()
        return padded, squares.view(*padded.shape[:-1], groups)

    def _copied(self) -> Tensor:
        """What is laid out, in PyTorch."""
        by_position, padding = self.inputs.movedim(1, -1), self.geometry.padding
        batch, *sizes, channels = by_position.shape
        padded = by_position.new_empty((batch, *self.geometry.padded(tuple(sizes)), channels))
        inner = padded
        for dim, (size, pad) in enumerate(zip(sizes, padding, strict=True), start=1):
            inner.narrow(dim, 0, pad).zero_()
            inner.narrow(dim, pad + size, pad).zero_()
            inner = inner.narrow(dim, pad, size)
        inner.copy_(by_position)
        return padded

    def norms(self) -> Tensor:
        """Norms of the rows, [M], or [M, groups] with several; in `score_dtype`."""
        norms = self._under_kernel(self._laid_out[1]).sqrt()
        return norms.reshape(-1) if self.groups == 1 else norms.reshape(-1, self.groups)

    def _under_kernel(self, a: Tensor) -> Tensor:
        """Sums over the taps at every position: [B, *padded, groups] to [B, *positions, groups]."""
        geometry = self.geometry
        every = zip(
            self._positions, geometry.kernel_size, geometry.stride, geometry.dilation, strict=True
        )
        for dim, (count, taps, step, gap) in enumerate(every, start=1):
            before = (slice(None),) * dim
            length = (count - 1) * step + 1
            ends = ((tap * gap, tap * gap + length) for tap in range(taps))
            a = functools.reduce(torch.add, [a[(*before, slice(*both, step))] for both in ends])
        return a

    def scores(self, g: Tensor | Maps) -> Tensor:
        """‖dW‖ of every row alone, √(Σ ‖x_c‖² ‖g_c‖²) over the groups: [M], for g [M, P].

        +Inf for a row that is not finite.
        """
        norms, groups = self.norms(), self.groups
        if groups == 1:
            scores = norms * (g.norms() if isinstance(g, Maps) else dispatch.row_norms(g))
        else:
            g = g.matrix() if isinstance(g, Maps) else g
            of_g = dispatch.row_norms(g.reshape(-1, g.shape[1] // groups)).view(-1, groups)
            scores = torch.linalg.vector_norm(norms * of_g, dim=1)
        return scores.nan_to_num_(nan=torch.inf, posinf=torch.inf)

    def rows(self, indices: Tensor) -> Tensor:
        """These rows, [K, N], or [groups, K, N] with several."""
        rows = self.picked(indices).matrix()
        if self.groups == 1:
            return rows
        taps = math.prod(self.geometry.kernel_size)
        of_groups = rows.view(len(indices), taps, self.groups, self.shape[1] // taps)
        return of_groups.permute(2, 0, 1, 3).flatten(2)

    def picked(self, indices: Tensor) -> Picked:
        """These rows of all channels, put together from the inputs when they are multiplied."""
        first, offsets, run = self._lines()
        count = len(first)
        of_sample = indices // count * self._lines_of_sample
        begins = of_sample + first.index_select(0, indices % count)
        return self._picked(begins, offsets, run)

    def _every_row(self) -> Picked:
        """`picked` of all rows."""
        first, offsets, run = self._lines()
        samples = torch.arange(len(self.inputs), device=self.device).unsqueeze(1)
        return self._picked((samples * self._lines_of_sample + first).flatten(), offsets, run)

    def _picked(self, begins: Tensor, offsets: Tensor, run: int) -> Picked:
        padded = self._laid_out[0]
        return Picked(padded.view(-1, padded.shape[-1]), begins, offsets, run)

    @property
    def _lines_of_sample(self) -> int:
        """Positions of one sample's inputs, padding included."""
        return math.prod(self.geometry.padded(tuple(self.inputs.shape[2:])))

    def _lines(self) -> tuple[Tensor, Tensor, int]:
        """`_lines_of` these inputs, and its `run`."""
        geometry = self.geometry
        # Taps of the last dimension that are neighbours lie side by side.
        run = geometry.kernel_size[-1] if geometry.dilation[-1] == 1 else 1
        # What is made while a graph is captured is not there any more afterwards.
        lines_of = _lines_of.__wrapped__ if targets.is_capturing(self.device) else _lines_of
        sizes = geometry.padded(tuple(self.inputs.shape[2:]))
        where = geometry, self._positions, sizes, run, self.device, _stream(self.device)
        return *lines_of(*where), run

    def __getitem__(self, rows: slice) -> Tensor:
        first, end, step = rows.indices(self.shape[0])
        return self.rows(torch.arange(first, end, step, device=self.device))

    def project(self, basis: Tensor) -> tuple[Tensor, Tensor]:
        """`dispatch.project_rows` of all rows, for Q [N, q]: Z [M, q], and [M] norms. One group."""
        rank = basis.shape[1]
        scale = basis_scale(self.shape[1])
        filters = self._as_weight((basis / scale).t())
        norms = self.norms()
        geometry, (inputs, padding) = self.geometry, self._as_laid_out()
        z = torch.ops.aten.convolution(
            inputs,
            filters,
            None,
            geometry.stride,
            padding,
            geometry.dilation,
            False,
            [0] * len(geometry.stride),
            1,
        )
        z = z.movedim(1, -1).reshape(-1, rank)
        rounding = torch.finfo(self.dtype).eps
        if z.is_cuda and self.dtype == torch.float32:
            rounding = max(rounding, _EPS_OF_TF32)  # convolutions use it unless told not to
        return z, rest_beside(norms, z, scale, rounding)

    def transposed_mm(self, a: Tensor) -> Tensor:
        """Aᵀ X, [q, N], for a [M, q]: a product that takes every row. Groups divide the q."""
        if a.is_cpu and self.groups == 1:
            product = native.transposed_mm(a, self._every_row())
            if product is not None:
                return product
        maps = a.reshape(len(self.inputs), *self._positions, a.shape[1]).movedim(-1, 1)
        return self.product_with(maps)

    def product_with(self, maps: Tensor) -> Tensor:
        """The same for [B, q, *positions]: the gradient of the weight of a convolution to these."""
        geometry, rank = self.geometry, maps.shape[1]
        like = self._as_weight(maps.new_empty((rank, self.shape[1])))
        inputs, padding = self._as_laid_out()
        product: Tensor = torch.ops.aten.convolution_backward(
            maps,
            inputs,
            like,
            None,
            geometry.stride,
            padding,
            geometry.dilation,
            False,
            [0] * len(geometry.stride),
            geometry.groups,
            (False, True, False),
        )[1]
        return product.movedim(1, -1).reshape(rank, -1)

    def _as_laid_out(self) -> tuple[Tensor, tuple[int, ...]]:
        """Inputs and padding of a convolution: where rows were read, what was laid out for them."""
        if "_laid_out" in vars(self):
            return self._laid_out[0].movedim(-1, 1), (0,) * len(self.geometry.padding)
        return self.inputs, self.geometry.padding

    def _as_weight(self, rows: Tensor) -> Tensor:
        """[q, N] in the order of a weight, [q, C, *kernel_size]."""
        return as_weight(rows, self.geometry.kernel_size)


def _stream(device: torch.device) -> int:
    """The number of the stream that works on a device: another one would have to wait."""
    if device.type == "cpu":
        return 0
    number: int = torch.accelerator.current_stream(device).stream_id
    return number


@functools.lru_cache(maxsize=64)
def _lines_of(
    geometry: Geometry,
    positions: tuple[int, ...],
    sizes: tuple[int, ...],
    run: int,
    device: torch.device,
    stream: int,
) -> tuple[Tensor, Tensor]:
    """In inputs of these sizes, padding included, as lines of channels, one sample's:

    The line under the first tap at every position of the output, and how much further those of the
    taps are, of every `run` neighbours the first.
    """
    first, offsets = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
    distance = 1
    for dim in reversed(range(len(sizes))):
        taps = geometry.kernel_size[dim]
        taps = taps // run if dim == len(sizes) - 1 else taps
        places = torch.arange(positions[dim], device=device) * (geometry.stride[dim] * distance)
        steps = torch.arange(taps, device=device) * (geometry.dilation[dim] * distance)
        first = (places.unsqueeze(1) + first).flatten()
        offsets = (steps.unsqueeze(1) + offsets).flatten()
        distance *= sizes[dim]
    return first, offsets


def as_weight(rows: Tensor, kernel_size: tuple[int, ...]) -> Tensor:
    """Rows of patches, [q, N], as a weight of a convolution, [q, C, *kernel_size]: a view."""
    return rows.view(len(rows), *kernel_size, -1).movedim(-1, 1)
