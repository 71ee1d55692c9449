"""Group normalisation followed by SiLU, forward and backward, for contiguous and channels-last
tensors.

Computes: x̂ = (x − mean_g) · rstd_g,  u = w_c x̂ + b_c,  y = u σ(u);
          with du = dy σ(u) (1 + u (1 − σ(u))):  dw_c = Σ du x̂,  db_c = Σ du,
          dx = rstd (w du − mean_g(w du) − x̂ mean_g(w du x̂)).
Contract: x [B, C, *positions], dense, contiguous or channels last; y, dx and grad have the layout
    of x.
Numerics: float32. The statistics come from tiles: sums about the tile's own mean, on values less
    the group's first one, so that a large offset costs no digits; tiles are merged as Chan et al.
    do. All sums have a fixed order; no atomics.
Shape of the code: a tile is [R positions, W channels]. Channels-last tiles span GROUPS adjacent
    groups, so that whole sectors move; contiguous ones prefer one channel with many positions. Up
    to SPLIT programs share a group: each takes the statistics of all of it (mostly from L2) and
    writes its own tiles: about 2 reads and 1 write of memory. Backward: first dw and db, as partial
    sums that lie in the memory of dx, which is written last, so that no scratch is needed; then dx,
    in the manner of the forward pass: 4 reads and 1 write.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from vqfast.kernels._tuning import not_floats, on_device, power_of_2

_TILE = 2048  # values of a tile: 16 a thread
_PROGRAMS = 528  # four for each SM of an H100; below it, programs share a group
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _channels(group, c0, CG: tl.constexpr, W: tl.constexpr, GROUPS: tl.constexpr):
    """Channels of a tile [W], and which of them belong to it."""
    lane = tl.arange(0, W)
    return group * CG + c0 + lane, (c0 + lane < CG) | (GROUPS > 1)


@triton.jit
def _offsets(p, c, P, C, LAST: tl.constexpr):
    """[R, W] offsets of positions p and channels c inside one image."""
    if LAST:
        return p.to(tl.int64)[:, None] * C + c[None, :]
    return c.to(tl.int64)[None, :] * P + p[:, None]


@triton.jit
def _group_sum(t, GROUPS: tl.constexpr):
    """[R, GROUPS * CH] -> [GROUPS]"""
    W: tl.constexpr = t.shape[1]
    return tl.sum(tl.reshape(tl.sum(t, axis=0), [GROUPS, W // GROUPS]), axis=1)


@triton.jit
def _spread(g, W: tl.constexpr):
    """[GROUPS] -> [1, W]: the value of each channel's group"""
    GROUPS: tl.constexpr = g.shape[0]
    return tl.reshape(tl.broadcast_to(g[:, None], [GROUPS, W // GROUPS]), [1, W])


@triton.jit
def _silu_gradient(x_hat, w, b, dy):
    """du of the module docstring."""
    u = x_hat * w + b
    gate = 1.0 / (1.0 + tl.exp(-u))
    return dy * gate * (1.0 + u * (1.0 - gate))


@triton.jit
def _forward(
    x, weight, bias, y, mean, rstd, P, C, G, eps,
    CG: tl.constexpr, GROUPS: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    SPLIT: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    blocks = G // GROUPS
    image = (tl.program_id(0) // blocks).to(tl.int64)
    group = (tl.program_id(0) % blocks) * GROUPS
    x += image * C * P
    y += image * C * P
    position_tiles = tl.cdiv(P, R)
    tiles = position_tiles * (1 if GROUPS > 1 else tl.cdiv(CG, W))
    first = (group + tl.arange(0, GROUPS)).to(tl.int64) * CG
    pivot = tl.load(x + first * (1 if LAST else P)).to(tl.float32)  # [GROUPS]
    count = tl.zeros([GROUPS], tl.float32)
    mu = tl.zeros([GROUPS], tl.float32)  # of x - pivot
    m2 = tl.zeros([GROUPS], tl.float32)
    for t in range(0, tiles):
        p = (t % position_tiles) * R + tl.arange(0, R)
        c, real = _channels(group, (t // position_tiles) * W, CG, W, GROUPS)
        mask = (p < P)[:, None] & real[None, :]
        value = tl.load(x + _offsets(p, c, P, C, LAST), mask=mask, other=0.0).to(tl.float32)
        value = tl.where(mask, value - _spread(pivot, W), 0.0)
        n = _group_sum(mask.to(tl.float32), GROUPS)
        tile_mu = _group_sum(value, GROUPS) / n
        off = tl.where(mask, value - _spread(tile_mu, W), 0.0)
        delta = tile_mu - mu
        part = n / (count + n)
        m2 += _group_sum(off * off, GROUPS) + delta * delta * count * part
        mu += delta * part
        count += n
    scale = 1.0 / tl.sqrt_rn(m2 / count + eps)
    if tl.program_id(1) == 0:
        at = image * G + group + tl.arange(0, GROUPS)
        tl.store(mean + at, pivot + mu)
        tl.store(rstd + at, scale)
    for t in range(tl.program_id(1), tiles, SPLIT):
        p = (t % position_tiles) * R + tl.arange(0, R)
        c, real = _channels(group, (t // position_tiles) * W, CG, W, GROUPS)
        mask = (p < P)[:, None] & real[None, :]
        at = _offsets(p, c, P, C, LAST)
        w = tl.load(weight + c, mask=real, other=0.0).to(tl.float32)[None, :]
        b = tl.load(bias + c, mask=real, other=0.0).to(tl.float32)[None, :]
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        x_hat = (value - _spread(pivot, W) - _spread(mu, W)) * _spread(scale, W)
        u = x_hat * w + b
        tl.store(y + at, (u / (1.0 + tl.exp(-u))).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _affine(
    grad, x, weight, bias, mean, rstd, dw, db, P, C, G, images, positions,
    CG: tl.constexpr, R: tl.constexpr, W: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Sums of du x̂ and du over some images and positions: one row of dw and db [rows, C]."""
    parts = tl.cdiv(P, positions)
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * W + tl.arange(0, W)
    real = c < C
    w = tl.load(weight + c, mask=real, other=0.0).to(tl.float32)[None, :]
    b = tl.load(bias + c, mask=real, other=0.0).to(tl.float32)[None, :]
    begin = (row % parts).to(tl.int32) * positions
    end = tl.minimum(begin + positions, P)
    sum_w = tl.zeros([W], tl.float32)
    sum_b = tl.zeros([W], tl.float32)
    # int64 as row is
    for image in range((row // parts) * images, (row // parts + 1) * images):
        mu = tl.load(mean + image * G + c // CG, mask=real, other=0.0)[None, :]
        scale = tl.load(rstd + image * G + c // CG, mask=real, other=0.0)[None, :]
        for start in range(begin, end, R):
            p = start + tl.arange(0, R)
            mask = (p < end)[:, None] & real[None, :]
            at = image * C * P + _offsets(p, c, P, C, LAST)
            x_hat = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - mu) * scale
            dy = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
            du = tl.where(mask, _silu_gradient(x_hat, w, b, dy), 0.0)
            sum_w += tl.sum(du * x_hat, axis=0)
            sum_b += tl.sum(du, axis=0)
    tl.store(dw + row * C + c, sum_w.to(dw.dtype.element_ty), mask=real)
    tl.store(db + row * C + c, sum_b.to(db.dtype.element_ty), mask=real)


@triton.jit
def _merge(partial, dw, db, rows, C, R: tl.constexpr, W: tl.constexpr):
    """Adds the rows of both [rows, C] halves of `partial`, in order."""
    c = tl.program_id(0) * W + tl.arange(0, W)
    sum_w = tl.zeros([W], tl.float32)
    sum_b = tl.zeros([W], tl.float32)
    for start in range(0, rows, R):
        row = (start + tl.arange(0, R)).to(tl.int64)
        mask = (row < rows)[:, None] & (c < C)[None, :]
        at = row[:, None] * C + c[None, :]
        sum_w += tl.sum(tl.load(partial + at, mask=mask, other=0.0), axis=0)
        sum_b += tl.sum(
            tl.load(partial + C * tl.cast(rows, tl.int64) + at, mask=mask, other=0.0), axis=0
        )
    tl.store(dw + c, sum_w.to(dw.dtype.element_ty), mask=c < C)
    tl.store(db + c, sum_b.to(db.dtype.element_ty), mask=c < C)


@triton.jit
def _input_gradient(
    grad, x, weight, bias, mean, rstd, dx, P, C, G,
    CG: tl.constexpr, GROUPS: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    SPLIT: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    blocks = G // GROUPS
    image = (tl.program_id(0) // blocks).to(tl.int64)
    group = (tl.program_id(0) % blocks) * GROUPS
    x += image * C * P
    grad += image * C * P
    dx += image * C * P
    position_tiles = tl.cdiv(P, R)
    tiles = position_tiles * (1 if GROUPS > 1 else tl.cdiv(CG, W))
    at_group = image * G + group + tl.arange(0, GROUPS)
    mu = _spread(tl.load(mean + at_group), W)
    scale = _spread(tl.load(rstd + at_group), W)
    sum_1 = tl.zeros([GROUPS], tl.float32)  # of w du
    sum_x = tl.zeros([GROUPS], tl.float32)  # of w du x̂
    for t in range(0, tiles):
        p = (t % position_tiles) * R + tl.arange(0, R)
        c, real = _channels(group, (t // position_tiles) * W, CG, W, GROUPS)
        mask = (p < P)[:, None] & real[None, :]
        at = _offsets(p, c, P, C, LAST)
        w = tl.load(weight + c, mask=real, other=0.0).to(tl.float32)[None, :]
        b = tl.load(bias + c, mask=real, other=0.0).to(tl.float32)[None, :]
        x_hat = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - mu) * scale
        dy = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        du = tl.where(mask, w * _silu_gradient(x_hat, w, b, dy), 0.0)
        sum_1 += _group_sum(du, GROUPS)
        sum_x += _group_sum(du * x_hat, GROUPS)
    n = 1.0 * CG * P
    mean_1 = _spread(sum_1 / n, W)
    mean_x = _spread(sum_x / n, W)
    for t in range(tl.program_id(1), tiles, SPLIT):
        p = (t % position_tiles) * R + tl.arange(0, R)
        c, real = _channels(group, (t // position_tiles) * W, CG, W, GROUPS)
        mask = (p < P)[:, None] & real[None, :]
        at = _offsets(p, c, P, C, LAST)
        w = tl.load(weight + c, mask=real, other=0.0).to(tl.float32)[None, :]
        b = tl.load(bias + c, mask=real, other=0.0).to(tl.float32)[None, :]
        x_hat = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - mu) * scale
        dy = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        du = w * _silu_gradient(x_hat, w, b, dy)
        out = scale * (du - mean_1 - x_hat * mean_x)
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=mask)


def _layout(x: Tensor) -> tuple[bool, int]:
    """(channels last, positions); a tensor that is both counts as contiguous."""
    return not x.is_contiguous(), x[0, 0].numel()


def _shape(x: Tensor, groups: int) -> dict[str, int]:
    """Tile and grid constants; they depend on the shape of one image, and SPLIT on the batch."""
    B, C = x.shape[:2]
    last, P = _layout(x)
    cg = C // groups
    per_tile, width = 1, power_of_2(cg, 1, 64)
    if last and width == cg:  # adjacent groups, up to 32 bytes of channels
        while groups % (2 * per_tile) == 0 and per_tile * cg * x.element_size() < 32:
            per_tile *= 2
    if not last:  # many positions of few channels
        width = min(width, power_of_2(_TILE // power_of_2(P, 1, _TILE), 1, 64))
    W = width * per_tile
    R = power_of_2(P, 1, _TILE // W)
    tiles = triton.cdiv(P, R) * triton.cdiv(cg, width)
    split = power_of_2(_PROGRAMS // max(1, B * groups // per_tile), 1, 16)
    return {"CG": cg, "GROUPS": per_tile, "R": R, "W": W, "SPLIT": min(split, tiles), "LAST": last}


def _refusal(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor | None = None) -> str | None:
    last = _layout(x)[0]
    for name, t in (("x", x), ("grad", x if grad is None else grad)):
        if not (t.movedim(1, -1) if last else t).is_contiguous():
            return f"{name} is not {'channels last like x' if last else 'contiguous'}"
    return not_floats(x=x, weight=weight, bias=bias)


def unsupported_group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> str | None:
    """Why these inputs cannot run: other dtypes, or x neither contiguous nor channels last."""
    return _refusal(x, weight, bias)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """Writes y like x, and mean and rstd [B, groups] float32."""
    if x.numel() == 0:
        mean.fill_(float("nan"))  # of nothing, where there are images without positions
        rstd.fill_(float("nan"))
        return
    shape = _shape(x, groups)
    grid = (x.shape[0] * groups // shape["GROUPS"], shape["SPLIT"])
    with on_device(x):
        _forward[grid](
            x, weight, bias, y, mean, rstd, _layout(x)[1], x.shape[1], groups, eps,
            **shape, **_OPTIONS,
        )  # fmt: skip


def unsupported_group_norm_silu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int
) -> str | None:
    """Why these inputs cannot run, as for the forward pass; grad has the layout of x."""
    return _refusal(x, weight, bias, grad) or not_floats(grad=grad)


def group_norm_silu_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    dx: Tensor,
    dw: Tensor,
    db: Tensor,
) -> None:
    """Writes dx like x, dw and db [C], from grad like x and what the forward pass left."""
    if x.numel() == 0:
        dw.zero_()
        db.zero_()
        return
    shape = _shape(x, groups)
    with on_device(x):
        _affine_gradients(grad, x, weight, bias, mean, rstd, groups, dx, dw, db)
        _input_gradient[(x.shape[0] * groups // shape["GROUPS"], shape["SPLIT"])](
            grad, x, weight, bias, mean, rstd, dx, _layout(x)[1], x.shape[1], groups,
            **shape, **_OPTIONS,
        )  # fmt: skip


def _affine_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    dx: Tensor,
    dw: Tensor,
    db: Tensor,
) -> None:
    """dw and db. Partial sums take 8 bytes a channel and row block, and borrow the memory of dx."""
    B, C = x.shape[:2]
    last, P = _layout(x)
    W = power_of_2(C, 1, 32 if last else max(1, min(32, _TILE // triton.next_power_of_2(P))))
    R = power_of_2(P, 1, _TILE // W)
    wanted = triton.cdiv(_PROGRAMS, B * triton.cdiv(C, W))
    parts = min(wanted, triton.cdiv(P, R), P * x.element_size() // 8)
    tile = {"CG": C // groups, "R": R, "W": W, "LAST": last}
    grid_c = triton.cdiv(C, W)
    inputs = (grad, x, weight, bias, mean, rstd)
    if parts == 0 or B * parts == 1:  # images of a few bytes, or nothing to merge
        _affine[(1, grid_c)](*inputs, dw, db, P, C, groups, B, P, **tile, **_OPTIONS)
        return
    positions = triton.cdiv(triton.cdiv(P, parts), R) * R
    rows = B * triton.cdiv(P, positions)
    flat = torch.as_strided(
        dx, (dx.numel() * dx.element_size() // 4 * 4 // dx.element_size(),), (1,)
    )
    partial = flat.view(torch.float32)
    _affine[(rows, grid_c)](
        *inputs, partial, partial[rows * C :], P, C, groups, 1, positions, **tile, **_OPTIONS
    )
    _merge[(triton.cdiv(C, 32),)](partial, dw, db, rows, C, R=32, W=32, **_OPTIONS)
