"""The memory passes over a feature map on a GPU, by Triton kernels.

A kernel works on tiles [BLOCK_C, BLOCK_S] of one image: some channels by some of its S = H * W positions. One code
serves both layouts, the shape of the tile makes it coalesced: long in S where images are stored channel by channel, a
cache line wide in C for channels_last. Arithmetic is in float32, for float64 in float64. The order of every sum follows
from the shape of the feature map alone: results repeat bit for bit.
"""
import functools
import math
from types import SimpleNamespace
from typing import NamedTuple, Tuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs comes without
    triton, tl = None, SimpleNamespace(constexpr=None)  # the kernels below are then only defined

__all__ = ['apply', 'available', 'combine', 'reduce', 'statistics']

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OPTIONS = {'num_warps': 8, 'enable_fp_fusion': True}  # the second is Triton's default, from 3.9 on with a warning
TILE = 8192  # bytes that a tile has of each feature map: two loads of 16 bytes for each thread
LINE = 128  # bytes of a cache line
PROGRAMS = 4096  # some waves on a large GPU; a reduction splits S where images and channels alone give fewer
MIN_TILES = 4  # in one part of a split S: a smaller one is not worth the launch that merges
MAX_PARTS = 256


def _jit(kernel):
    return kernel if triton is None else triton.jit(kernel)


@_jit
def _tile(
        channels,
        space,
        turns,
        CHANNELS_LAST: tl.constexpr,
        ALIGN: tl.constexpr,
        BLOCK_C: tl.constexpr,
        BLOCK_S: tl.constexpr,
):
    """The first of the `turns` tiles, one behind the other along S, that are this program's.

    Returns:
        Index of the part of S; index into [B, C] of each channel and whether it is one, [BLOCK_C, 1]; positions in the
        tile [1, BLOCK_S] and how many are left up to the end of S; offset of the tile in the feature map, offsets in
        the tile, and the step from one tile to the next. What may pass 2**31 is int64.
    """
    # What the compiler cannot know: ALIGN divides the contiguous extent, so that loads may be as wide
    if CHANNELS_LAST:
        channels = channels // ALIGN * ALIGN
        stride_c = 1
        stride_s = channels
    else:
        space = space // ALIGN * ALIGN
        stride_c = space
        stride_s = 1
    tiles_c = tl.cdiv(channels, BLOCK_C)
    parts = tl.cdiv(space, turns * BLOCK_S)
    program = tl.program_id(0)
    part = program // tiles_c % parts
    first_c = program % tiles_c * BLOCK_C
    first_s = part * turns * BLOCK_S
    image = (program // tiles_c // parts).to(tl.int64)
    c = tl.arange(0, BLOCK_C)[:, None]
    s = tl.arange(0, BLOCK_S)[None, :]
    start = image * channels * space + first_c.to(tl.int64) * stride_c + first_s.to(tl.int64) * stride_s
    within = c * stride_c + s * stride_s
    row = image * channels + first_c + c
    return part, row, first_c + c < channels, s, space - first_s, start, within, BLOCK_S * stride_s


@_jit
def _merge(count, mean, m2):
    """Mean and variance [R, 1] of R groups from count, mean and sum of squared deviations [R, P] of their parts.

    By Chan, Golub and LeVeque (1979): stable where the mean is large against the deviation.
    """
    total = tl.sum(count, 1)[:, None]
    merged = tl.sum(count * mean, 1)[:, None] / total
    delta = mean - merged
    return merged, tl.sum(m2 + count * delta * delta, 1)[:, None] / total


@_jit
def _statistics(
        z, mean, var, rows, channels, space, turns,
        CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):
    """Mean and variance [parts, rows] of each part of S, with rows = B * C."""
    part, row, valid, s, left, start, within, step = _tile(
        channels, space, turns, CHANNELS_LAST, ALIGN, BLOCK_C, BLOCK_S)
    # Welford's recurrence, each element of the tile for itself
    dtype: tl.constexpr = mean.dtype.element_ty
    turn = tl.zeros([1, 1], dtype)
    count = tl.zeros([1, BLOCK_S], dtype)
    m = tl.zeros([BLOCK_C, BLOCK_S], dtype)
    m2 = tl.zeros([BLOCK_C, BLOCK_S], dtype)
    for _ in range(turns):
        inside = s < left
        x = tl.load(z + start + within, mask=valid & inside, other=0).to(dtype)
        turn += 1
        count = tl.where(inside, turn, count)
        delta = x - m
        m += delta * tl.where(inside, 1 / turn, 0)
        m2 += delta * tl.where(inside, 1 - 1 / turn, 0) * delta
        left -= BLOCK_S
        start += step
    m, v = _merge(count, m, m2)
    tl.store(mean + part.to(tl.int64) * rows + row, m, mask=valid)
    tl.store(var + part.to(tl.int64) * rows + row, v, mask=valid)


@_jit
def _merge_statistics(
        part_mean, part_var, mean, var, rows, parts, space, length,
        BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):
    """[parts, rows] -> [rows]; all parts of S but the last have the same length."""
    dtype: tl.constexpr = mean.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    part = tl.arange(0, BLOCK_P)[None, :]
    mask = (row < rows) & (part < parts)
    offset = part.to(tl.int64) * rows + row
    count = tl.maximum(tl.minimum(space - part * length, length), 0).to(dtype)
    m = tl.load(part_mean + offset, mask=mask, other=0)
    v = tl.load(part_var + offset, mask=mask, other=0)
    m, v = _merge(count, m, v * count)
    tl.store(mean + row, m, mask=row < rows)
    tl.store(var + row, v, mask=row < rows)


@_jit
def _apply(
        z, mean, scale, shift, shortcut, out, channels, space, turns,
        CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):
    _, row, valid, s, left, start, within, _ = _tile(
        channels, space, turns, CHANNELS_LAST, ALIGN, BLOCK_C, BLOCK_S)
    dtype: tl.constexpr = mean.dtype.element_ty
    mask = valid & (s < left)
    x = tl.load(z + start + within, mask=mask).to(dtype)
    r = tl.load(shortcut + start + within, mask=mask).to(dtype)
    m = tl.load(mean + row, mask=valid)
    a = tl.load(scale + row, mask=valid)
    b = tl.load(shift + row, mask=valid)
    y = (x - m) * a + b + r
    y = tl.where(y <= 0, 0, y)  # NaN stays
    tl.store(out + start + within, y.to(out.dtype.element_ty), mask=mask)


@_jit
def _reduce(
        grad, out, z, mean, g, sum_g, sum_gz, rows, channels, space, turns,
        CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):
    """g, and for each part of S the sums [parts, rows], with rows = B * C."""
    part, row, valid, s, left, start, within, step = _tile(
        channels, space, turns, CHANNELS_LAST, ALIGN, BLOCK_C, BLOCK_S)
    dtype: tl.constexpr = mean.dtype.element_ty
    m = tl.load(mean + row, mask=valid, other=0)
    total = tl.zeros([BLOCK_C, BLOCK_S], dtype)
    total_z = tl.zeros([BLOCK_C, BLOCK_S], dtype)
    for _ in range(turns):
        mask = valid & (s < left)
        y = tl.load(out + start + within, mask=mask, other=0).to(dtype)
        x = tl.load(z + start + within, mask=mask, other=0).to(dtype)
        d = tl.load(grad + start + within, mask=mask, other=0).to(dtype)
        d = tl.where(y <= 0, 0, d)  # torch too lets the gradient pass where out is NaN
        tl.store(g + start + within, d.to(g.dtype.element_ty), mask=mask)
        total += d
        total_z += d * (x - m)
        left -= BLOCK_S
        start += step
    row += part.to(tl.int64) * rows
    tl.store(sum_g + row, tl.sum(total, 1)[:, None], mask=valid)
    tl.store(sum_gz + row, tl.sum(total_z, 1)[:, None], mask=valid)


@_jit
def _combine(
        g, z, mean, k1, k2, k3, dz, channels, space, turns,
        CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):
    _, row, valid, s, left, start, within, _ = _tile(
        channels, space, turns, CHANNELS_LAST, ALIGN, BLOCK_C, BLOCK_S)
    dtype: tl.constexpr = mean.dtype.element_ty
    mask = valid & (s < left)
    d = tl.load(g + start + within, mask=mask).to(dtype)
    x = tl.load(z + start + within, mask=mask).to(dtype)
    m = tl.load(mean + row, mask=valid)
    p = tl.load(k1 + row, mask=valid)
    q = tl.load(k2 + row, mask=valid)
    r = tl.load(k3 + row, mask=valid)
    y = d * p + (x - m) * q + r
    tl.store(dz + start + within, y.to(dz.dtype.element_ty), mask=mask)


class Grid(NamedTuple):
    """How the programs of a kernel share a feature map."""
    channels: int
    space: int  # S
    channels_last: bool
    align: int  # divides the contiguous extent
    block_c: int
    block_s: int
    turns: int  # tiles of a program
    parts: int  # programs along S
    programs: int

    def launch(self, kernel, *args) -> None:
        """Run a kernel over feature maps of this shape; `args` are those in front of the ones that every kernel has."""
        _launch(
            kernel, self.programs, *args, self.channels, self.space, self.turns,
            CHANNELS_LAST=self.channels_last, ALIGN=self.align, BLOCK_C=self.block_c, BLOCK_S=self.block_s,
        )


def _launch(kernel, programs: int, *args, **constants) -> None:
    with torch.cuda.device_of(args[0]):  # Triton runs on the current device
        kernel[(programs,)](*args, **constants, **OPTIONS)


# triton.cdiv and triton.next_power_of_2 take microseconds in recent versions, for every launch

def _cdiv(n: int, d: int) -> int:
    return -(-n // d)


def _power_of_2(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()


def _memory_format(z: torch.Tensor) -> torch.memory_format:
    for memory_format in (torch.contiguous_format, torch.channels_last):
        if z.is_contiguous(memory_format=memory_format):
            return memory_format
    raise ValueError(f'a feature map must be contiguous or channels_last, not of strides {z.stride()}')


def _grid(z: torch.Tensor, split: bool) -> Grid:
    """Grid for a feature map; `split` for reductions: programs then take several tiles."""
    images, channels, height, width = z.shape
    space = height * width
    channels_last = _memory_format(z) is torch.channels_last
    elements = TILE // z.element_size()
    wide_c, wide_s = _power_of_2(channels), _power_of_2(space)
    if channels_last:
        block_c = min(wide_c, LINE // z.element_size())
        block_s = min(wide_s, elements // block_c)
    else:
        block_s = min(wide_s, elements)
        block_c = min(wide_c, elements // block_s)
    tiles = _cdiv(space, block_s)
    columns = images * _cdiv(channels, block_c)
    turns = 1
    if split:
        parts = min(max(PROGRAMS // columns, 1), max(tiles // MIN_TILES, 1), MAX_PARTS)
        turns = _cdiv(tiles, parts)
    parts = _cdiv(tiles, turns)
    align = math.gcd(channels if channels_last else space, 16)
    return Grid(channels, space, channels_last, align, block_c, block_s, turns, parts, columns * parts)


def _like(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """x in the layout of z, for the kernels know one set of strides."""
    if x.shape != z.shape:
        raise ValueError(f'feature maps must have one shape, not {tuple(x.shape)} and {tuple(z.shape)}')
    return x.contiguous(memory_format=_memory_format(z))


def _row(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    if x.shape != z.shape[:2]:
        raise ValueError(f'one value per image and channel of {tuple(z.shape)} is needed, not {tuple(x.shape)}')
    return x.contiguous()


def _empty(z: torch.Tensor, parts: int) -> torch.Tensor:
    """Room for two results [B, C] of each part: [2, parts, B, C]."""
    return z.new_empty((2, parts, *z.shape[:2]), dtype=torch.promote_types(z.dtype, torch.float32))


@functools.lru_cache(maxsize=None)
def _runs_on(device: torch.device) -> bool:
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device) >= (8, 0)  # the oldest that recent Tritons compile for
    return not isinstance(_apply, triton.JITFunction)  # TRITON_INTERPRET=1 when triton was imported


def available(z: torch.Tensor) -> bool:
    """True if these passes take a feature map: floating point of 16 to 64 bits, contiguous or channels_last, not empty.

    It must be on a GPU that Triton compiles for; or Triton interprets, for tests without a GPU.
    """
    return (
        triton is not None
        and z.dtype in DTYPES
        and z.dim() == 4
        and (z.is_contiguous() or z.is_contiguous(memory_format=torch.channels_last))
        and z.numel() > 0
        and _runs_on(z.device)
    )


def statistics(z: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance over H and W: [B, C, H, W] -> [B, C] each.

    Raises:
        ValueError: z, here as in the other passes, is neither contiguous nor channels_last.
    """
    grid = _grid(z, split=True)
    rows = z.shape[0] * z.shape[1]
    mean, var = parts = _empty(z, grid.parts)
    grid.launch(_statistics, z, mean, var, rows)
    if grid.parts > 1:
        block_p = _power_of_2(grid.parts)
        block_r = 2048 // block_p
        mean, var = merged = _empty(z, 1)
        _launch(
            _merge_statistics, _cdiv(rows, block_r), *parts, *merged,
            rows, grid.parts, grid.space, grid.turns * grid.block_s, BLOCK_R=block_r, BLOCK_P=block_p,
        )
    return mean[0], var[0]


def apply(
        z: torch.Tensor,
        mean: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        shortcut: torch.Tensor,
) -> torch.Tensor:
    """relu((z - mean) * scale + shift + shortcut), with mean, scale and shift [B, C], of z's type and layout.

    Raises:
        ValueError: An argument has another shape; in `reduce` and `combine` too.
    """
    out = torch.empty_like(z)
    _grid(z, split=False).launch(
        _apply, z, _row(mean, z), _row(scale, z), _row(shift, z), _like(shortcut, z), out)
    return out


def reduce(
        grad: torch.Tensor,
        out: torch.Tensor,
        z: torch.Tensor,
        mean: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradient g behind the ReLU [B, C, H, W], and over H and W the sums of g and of g * (z - mean), [B, C] each."""
    grid = _grid(z, split=True)
    g = torch.empty_like(z)
    sums = _empty(z, grid.parts)
    grid.launch(
        _reduce, _like(grad, z), _like(out, z), z, _row(mean, z), g, *sums, z.shape[0] * z.shape[1])
    sum_g, sum_gz = sums.sum(1) if grid.parts > 1 else sums[:, 0]
    return g, sum_g, sum_gz


def combine(
        g: torch.Tensor,
        z: torch.Tensor,
        mean: torch.Tensor,
        k1: torch.Tensor,
        k2: torch.Tensor,
        k3: torch.Tensor,
) -> torch.Tensor:
    """g * k1 + (z - mean) * k2 + k3, with all k [B, C]."""
    dz = torch.empty_like(z)
    _grid(z, split=False).launch(
        _combine, _like(g, z), z, _row(mean, z), _row(k1, z), _row(k2, z), _row(k3, z), dz)
    return dz
