# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="import-untyped, import-not-found"
"""The kernels of triton_impl.py.

GEMM rows are output pixels, columns outputs, and the depth runs over sources, taps and channels. A mask is 1 = valid,
0 = hole. Whether the pixel under a tap is valid (and inside of the map) is one bit of a word per row, gathered before
the walk over the depth: so the walk's loads are predicated by registers alone, and a hole's value is never read.
Products are accumulated in float32, counts in int32. Maps are read and written as (N, H, W, C), weights are read as
(O, kh, kw, C). No atomics: a split depth goes through a workspace that a second kernel sums in a fixed order.
"""

import triton
import triton.language as tl

from ..triton_common import dot, first_tap


@triton.jit
def _locate(origin, h0, w0, dh, dw, height, width, UP: tl.constexpr):  # type: ignore[no-untyped-def]
    """(index of the stored pixel, whether it lies in the map) at (dh, dw) from where windows begin, (h0, w0).

    `origin` is the index of the image's first pixel, plus h0 * width + w0 where UP is 1: then only one addition depends
    on both row and tap.
    """
    h = h0 + dh
    w = w0 + dw
    inside = (h >= 0) & (h < height * UP) & (w >= 0) & (w < width * UP)
    if UP == 2:
        at = origin + (h >> 1) * width + (w >> 1)
    else:
        at = origin + (dh * width + dw)
    return at, inside


@triton.jit
def _multiplicity(tap, odd, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many of the kernel's k taps meet in this tap of the folded kernel, along one axis: 1 or 2."""
    at = 2 * (first_tap(odd, K) + tap) - odd
    return (tl.abs(at) <= K // 2).to(tl.int32) + (tl.abs(at + 1) <= K // 2).to(tl.int32)


@triton.jit
def _window_bits(  # type: ignore[no-untyped-def]
    mask, origin, h0, w0, alive, dil_h, dil_w, height, width, odd_h, odd_w,
    KH: tl.constexpr, KW: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, UP: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """(bits, sum) of one plane under each window; bit t is set where tap t's pixel is valid."""
    BITS: tl.constexpr = tl.int32 if TH * TW < 32 else tl.int64
    tap = tl.arange(0, triton.next_power_of_2(TH * TW))
    u = tap // TW
    v = tap % TW
    dh = (u * dil_h)[:, None]
    dw = (v * dil_w)[:, None]
    # (taps, BLOCK_M): neighbouring threads have neighbouring pixels.
    at, inside = _locate(origin[None, :], h0[None, :], w0[None, :], dh, dw, height, width, UP)
    read = inside & alive[None, :] & (tap < TH * TW)[:, None]
    valid = (tl.load(mask + at, mask=read, other=0) != 0).to(tl.int32)
    bits = tl.sum(valid.to(BITS) << tap.to(BITS)[:, None], 0)
    if LOW:
        valid *= (_multiplicity(u, odd_h, KH) * _multiplicity(v, odd_w, KW))[:, None]
    return bits, tl.sum(valid, 0)


@triton.jit
def _window_sum(  # type: ignore[no-untyped-def]
    mask, origin, h0, w0, alive, dil_h, dil_w, height, width, odd_h, odd_w, planes,
    KH: tl.constexpr, KW: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, UP: tl.constexpr, LOW: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of all planes under each window."""
    total = tl.zeros(alive.shape, tl.int32)
    for tap in range(TH * TW):
        u = tap // TW
        v = tap % TW
        at, inside = _locate(origin, h0, w0, u * dil_h, v * dil_w, height, width, UP)
        valid = tl.zeros(alive.shape, tl.int32)
        for chunk in range(0, planes, BLOCK):
            c = chunk + tl.arange(0, BLOCK)
            read = (inside & alive)[:, None] & (c < planes)[None, :]
            value = tl.load(mask + at[:, None] + (c * height * width)[None, :], mask=read, other=0)
            valid += tl.sum((value != 0).to(tl.int32), 1)
        if LOW:
            valid *= _multiplicity(u, odd_h, KH) * _multiplicity(v, odd_w, KW)
        total += valid
    return total


@triton.jit
def _add_source(  # type: ignore[no-untyped-def]
    acc,  # (BLOCK_M, BLOCK_N) float32
    count,  # (BLOCK_M,) int32
    x,  # (N, H, W, C)
    mask,  # (N or 1, 1 or C, H, W)
    weight,  # (O, kh, kw, depth), or (4, O, t, t, C) if folded
    n,  # (BLOCK_M,) image
    i,  # (BLOCK_M,) row and
    j,  # (BLOCK_M,) column of the output, within the phase
    alive,
    odd_h,
    odd_w,
    o,  # (BLOCK_N,) output
    o_alive,
    group,
    groups,
    outputs,
    begin,
    end,
    channels,
    height,
    width,
    mask_stride,
    span,
    depth,
    first,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dil_h,
    dil_w,
    KH: tl.constexpr,
    KW: tl.constexpr,
    UP: tl.constexpr,
    FOLD: tl.constexpr,
    WALK: tl.constexpr,
    PLANES: tl.constexpr,
    COUNT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Adds steps [begin, end) of one source's W . X~ to `acc`, and all of its valid values to `count`."""
    LOW: tl.constexpr = FOLD and UP == 2
    TH: tl.constexpr = (KH + 1) // 2 if LOW else KH
    TW: tl.constexpr = (KW + 1) // 2 if LOW else KW
    READ_UP: tl.constexpr = 1 if LOW else UP
    PHASE_STEP: tl.constexpr = 2 if FOLD else 1
    if LOW:
        h0 = i + first_tap(odd_h, KH)
        w0 = j + first_tap(odd_w, KW)
        weight += (odd_h * 2 + odd_w) * outputs * (TH * TW) * depth
    else:
        h0 = (i * PHASE_STEP + odd_h) * stride_h - pad_h
        w0 = (j * PHASE_STEP + odd_w) * stride_w - pad_w
    origin = n * (height * width)
    mask_origin = n * mask_stride
    if READ_UP == 1:
        origin += h0 * width + w0
        mask_origin += h0 * width + w0

    if PLANES == "one":
        bits, total = _window_bits(
            mask, mask_origin, h0, w0, alive, dil_h, dil_w, height, width, odd_h, odd_w, KH, KW, TH, TW, READ_UP, LOW
        )
        count += total * channels
    elif COUNT:
        planes = channels if PLANES == "many" else 1
        total = _window_sum(
            mask, mask_origin, h0, w0, alive, dil_h, dil_w, height, width, odd_h, odd_w, planes,
            KH, KW, TH, TW, READ_UP, LOW, BLOCK_K,
        )  # fmt: skip
        count += total * (channels // planes)

    own = channels // groups
    plane = height * width if PLANES == "many" else 0
    mask += group * own * plane
    x += group * own
    weight += first + o[None, :] * (TH * TW * depth)  # (1, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Steps find out of a whole row of bits, and what is out of range looks up a bit that is never set: written so, the
    # compiler moves the bits to the layout of the loads once, not in every step.
    NEVER: tl.constexpr = 31 if TH * TW < 32 else 63
    if WALK == "chunks":
        # A step is one tap and BLOCK_K channels.
        chunks = tl.cdiv(own, BLOCK_K)
        for step in range(begin, end):
            tap = step // chunks
            c = (step - tap * chunks) * BLOCK_K + k
            c_alive = c < own
            dh = tap // TW * dil_h
            dw = tap % TW * dil_w
            at, inside = _locate(origin, h0, w0, dh, dw, height, width, READ_UP)
            if PLANES == "one":
                valid = ((bits[:, None] >> tl.where(c_alive, tap, NEVER)[None, :]) & 1) != 0
            else:
                m = (at - origin + mask_origin)[:, None] + (c * plane)[None, :]
                read = (inside & alive)[:, None] & c_alive[None, :]
                valid = tl.load(mask + m, mask=read, other=0) != 0
            a = tl.load(x + ((at * channels)[:, None] + c[None, :]), mask=valid, other=0.0)
            b = tl.load(weight + (tap * depth + c)[:, None], mask=c_alive[:, None] & o_alive[None, :], other=0.0)
            acc = dot(a, b, acc, PRECISION)
    else:
        # A step is `span` rows of the kernel with all of their (tap, channel) pairs, whose offsets are the same in
        # every step.
        tap = k // own
        c = k - tap * own
        u = tap // TW
        dh = (u * dil_h)[None, :]
        dw = (tap % TW * dil_w)[None, :]
        for step in range(begin, end):
            top = step * span
            k_alive = (u < span) & (u < TH - top)
            down = top * dil_h
            here = origin + (down * width if READ_UP == 1 else 0)
            at, inside = _locate(here[:, None], (h0 + down)[:, None], w0[:, None], dh, dw, height, width, READ_UP)
            if PLANES == "one":
                valid = ((bits[:, None] >> tl.where(k_alive, top * TW + tap, NEVER)[None, :]) & 1) != 0
            else:
                m = at + (mask_origin - origin)[:, None] + (c * plane)[None, :]
                valid = tl.load(mask + m, mask=inside & alive[:, None] & k_alive[None, :], other=0) != 0
            a = tl.load(x + (at * channels + c[None, :]), mask=valid, other=0.0)
            b_at = (top * TW + tap) * depth + c
            b = tl.load(weight + b_at[:, None], mask=k_alive[:, None] & o_alive[None, :], other=0.0)
            acc = dot(a, b, acc, PRECISION)
    return acc, count


@triton.jit
def _finish(sums, count, o, alive, window, scale, bias, slope, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """act(scale * sums * window / count + bias) where count > 0, else 0, for outputs o; None is no scale or no bias."""
    y = sums * tl.div_rn(window, tl.maximum(count, 1).to(tl.float32))
    if scale is not None:
        y *= tl.load(scale + o, mask=alive, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + o, mask=alive, other=0.0).to(tl.float32)
    # NaN is not below 0, and stays.
    if ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)
    if ACTIVATION == "leaky_relu":
        y = tl.where(y < 0, y * slope, y)
    return tl.where(count > 0, y, 0.0)


# What only takes part in index arithmetic, and pointers to single values: kernels for each of their alignments would
# gain nothing.
_PLAIN = ["bias", "scale", "counts", "new_mask", "rows", "phase_h", "phase_w", "splits", "count_images", "count_stride"]
_PLAIN += ["stride_h", "stride_w", "pad_h", "pad_w", "dil_h", "dil_w"]
_PLAIN += [f"{name}{i}" for i in (0, 1) for name in ("mask", "height", "width", "mask_stride", "steps", "span")]


@triton.jit(do_not_specialize=_PLAIN)
def convolve_kernel(  # type: ignore[no-untyped-def]
    x0,  # (N, H_0, W_0, C_0)
    x1,
    mask0,  # (N or 1, 1 or C_0, H_0, W_0)
    mask1,
    weight0,  # (O, kh, kw, sum C_i / groups), or (4, O, t, t, C_0) if source 0 is folded
    weight1,
    bias,  # (O,) or None
    scale,  # (O,) or None
    counts,  # (N or 1, H', W') int32: read, or written if COUNT
    new_mask,  # (N or 1, H', W'), written if COUNT, else None
    out,  # (N, H', W', O), or (splits, N, H', W', O) float32 if PARTIAL
    rows,  # N * phase_h * phase_w
    phase_h,  # H', or H' / 2 if FOLD
    phase_w,
    outputs,  # O
    groups,
    splits,
    channels0,  # C_0
    height0,  # H_0
    width0,  # W_0
    mask_stride0,  # from one image's mask to the next, 0 if shared
    steps0,  # steps over this source
    span0,  # rows of the kernel in a step of a flat walk
    channels1,
    height1,
    width1,
    mask_stride1,
    steps1,
    span1,
    count_images,  # N or 1
    count_stride,  # from one image's count to the next, 0 if shared
    window,  # float
    slope,  # float
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dil_h,
    dil_w,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SOURCES: tl.constexpr,
    UP0: tl.constexpr,
    UP1: tl.constexpr,
    FOLD: tl.constexpr,  # the grid runs over 4 phases (row parity, column parity), upsampled sources at low resolution
    WALK0: tl.constexpr,  # "chunks" of channels tap by tap, or "flat" over (tap, channel)
    WALK1: tl.constexpr,
    PLANES0: tl.constexpr,  # "one", as bits; "large": one, under more taps than bits; "many": one for each channel
    PLANES1: tl.constexpr,
    COUNT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTIAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K0: tl.constexpr,
    BLOCK_K1: tl.constexpr,
):
    """One tile of rows x outputs, over the split's share of the depth."""
    LOW0: tl.constexpr = FOLD and UP0 == 2
    LOW1: tl.constexpr = FOLD and UP1 == 2
    PHASES: tl.constexpr = 4 if FOLD else 1
    PHASE_STEP: tl.constexpr = 2 if FOLD else 1
    # Columns first, then phases: neighbours in time share the pixels they read.
    group_outputs = outputs // groups
    tiles = tl.cdiv(group_outputs, BLOCK_N)
    column = tl.program_id(0) % (tiles * groups)
    row = tl.program_id(0) // (tiles * groups)
    group = column // tiles
    o = (column - group * tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_alive = o < group_outputs
    o += group * group_outputs
    odd_h = row % PHASES // 2
    odd_w = row % PHASES % 2
    m = row // PHASES * BLOCK_M + tl.arange(0, BLOCK_M)
    alive = m < rows
    n = m // (phase_h * phase_w)
    i = m // phase_w % phase_h
    j = m % phase_w

    whole = channels0 // groups
    steps = steps0
    if SOURCES == 2:
        whole += channels1
        steps += steps1
    split = tl.program_id(1)
    begin = 0
    end = steps
    if PARTIAL:
        begin = split * steps // splits
        end = (split + 1) * steps // splits
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    count = tl.zeros((BLOCK_M,), tl.int32)
    depth0 = channels0 if LOW0 else whole
    # fmt: off
    acc, count = _add_source(
        acc, count, x0, mask0, weight0, n, i, j, alive, odd_h, odd_w, o, o_alive, group, groups, outputs,
        tl.minimum(begin, steps0), tl.minimum(end, steps0), channels0, height0, width0, mask_stride0, span0,
        depth0, 0, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
        KH, KW, UP0, FOLD, WALK0, PLANES0, COUNT, PRECISION, BLOCK_K0,
    )
    if SOURCES == 2:
        depth1 = channels1 if LOW1 else whole
        first1 = 0 if LOW1 else channels0
        acc, count = _add_source(
            acc, count, x1, mask1, weight1, n, i, j, alive, odd_h, odd_w, o, o_alive, group, groups, outputs,
            tl.maximum(begin - steps0, 0), tl.maximum(end - steps0, 0), channels1, height1, width1, mask_stride1, span1,
            depth1, first1, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
            KH, KW, UP1, FOLD, WALK1, PLANES1, COUNT, PRECISION, BLOCK_K1,
        )
    # fmt: on

    pixel = (i * PHASE_STEP + odd_h) * (phase_w * PHASE_STEP) + j * PHASE_STEP + odd_w
    if COUNT:
        if (column == 0) & (split == 0):
            own = alive & (n < count_images)
            tl.store(counts + n * count_stride + pixel, count, mask=own)
            update = tl.where(count > 0, 1.0, 0.0).to(new_mask.dtype.element_ty)
            tl.store(new_mask + n * count_stride + pixel, update, mask=own)
    elif not PARTIAL:
        count = tl.load(counts + n * count_stride + pixel, mask=alive, other=0)

    pixels = phase_h * phase_w * PHASES
    to = out + (((n * pixels + pixel) * outputs)[:, None] + o[None, :])
    store = alive[:, None] & o_alive[None, :]
    if PARTIAL:
        tl.store(to + split * (rows * PHASES * outputs), acc, mask=store)
    else:
        y = _finish(acc, count[:, None], o[None, :], o_alive[None, :], window, scale, bias, slope, ACTIVATION)
        tl.store(to, y.to(out.dtype.element_ty), mask=store)


@triton.jit(do_not_specialize=["bias", "scale", "counts", "total", "pixels", "splits"])
def reduce_kernel(  # type: ignore[no-untyped-def]
    partial,  # (splits, N, H', W', O) float32
    bias,  # (O,) or None
    scale,  # (O,) or None
    counts,  # (N or 1, H', W') int32
    y,  # (N, H', W', O)
    total,  # N * H' * W' * O
    pixels,  # N * H' * W', or H' * W' if the count is shared
    outputs,  # O
    splits,
    window,  # float
    slope,  # float
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The splits' sums, added from first to last, and the epilogue."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    alive = at < total
    sums = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        sums += tl.load(partial + split * total + at, mask=alive, other=0.0)
    count = tl.load(counts + at // outputs % pixels, mask=alive, other=0)
    result = _finish(sums, count, at % outputs, alive, window, scale, bias, slope, ACTIVATION)
    tl.store(y + at, result.to(y.dtype.element_ty), mask=alive)
