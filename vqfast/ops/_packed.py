"""The packed weights of `decode_step`: panels of 64 rows in float32, bfloat16, int8 or int4.

A matrix [N, K] is cut into panels of 64 rows, with K padded to a multiple of 64 and N to one of
64 by zeros. The columns that one instruction multiplies at a time stand side by side for each row:

    bits 32  [Kp][64] float32
    bits 16  [Kp/2][64][2] bfloat16: two columns of a row
    bits 8   64 float32 row scales, then [Kp/4][64][4] uint8, value + 128: four columns of a row
    bits 4   per 32 columns: 64 bfloat16 scales, then [4][64][4] bytes: byte (v, r, j) holds value
             + 8 of column 8·v + j of the group in the low nibble, of 8·v + 4 + j in the high one

So a panel is one stream through memory, in which everything starts at a cache line.

The matrix is multiplied by rows x [K] that are rounded first (`operand`): to bfloat16 for bits 16;
for bits 8 and 4 to int8, each 32 columns with a scale of their own, so that the products of 32
columns add up exactly in int32.
"""

import torch
from torch import Tensor

LAYOUT = 2  # version of the description above, stored with packed weights in files
PANEL = 64  # rows of a panel
COLUMNS = 64  # K is padded to a multiple
GROUP = 32  # columns that share an int4 scale, and the scale of an int8 activation
_LEAST = 2.0**-100  # a group of activations below it becomes zeros
_OFFSET = {8: 128, 4: 8}  # added to a value, so that it is stored unsigned
# int4 scales that are tried, as parts of the one that just holds the largest value of a group: a
# smaller step for all may pay for clipping one
_INT4_SCALES = (1.0, 0.93, 0.86, 0.79)
_INT4_FITS = 2  # scales fitted to the rounded values by least squares, tried after those
_INT4_CHUNK = 128  # groups of 64 rows that are rounded at a time: they stay in the cache


def padded(n: int, to: int) -> int:
    return -(-n // to) * to


def panel_bytes(K: int, bits: int) -> int:
    Kp = padded(K, COLUMNS)
    scales = {32: 0, 16: 0, 8: PANEL * 4, 4: Kp // GROUP * PANEL * 2}[bits]
    return PANEL * Kp * bits // 8 + scales


def matrix_bytes(N: int, K: int, bits: int) -> int:
    return padded(N, PANEL) // PANEL * panel_bytes(K, bits)


def unpack(packed: Tensor, N: int, K: int, bits: int) -> Tensor:
    """One packed matrix as float32 [panels, Kp, 64]: element [p, k, r] is row 64·p + r, column
    k.
    """
    Kp = padded(K, COLUMNS)
    panels = packed.view(-1, panel_bytes(K, bits))  # [panels, bytes]
    if bits == 32:
        return panels.view(torch.float32).view(-1, Kp, PANEL)
    if bits == 16:
        pairs = panels.view(torch.bfloat16).view(-1, Kp // 2, PANEL, 2)
        return pairs.transpose(2, 3).reshape(-1, Kp, PANEL).float()
    if bits == 8:
        scale = panels[:, : PANEL * 4].contiguous().view(torch.float32)  # [panels, 64]
        quads = panels[:, PANEL * 4 :].reshape(-1, Kp // 4, PANEL, 4)
        values = quads.transpose(2, 3).reshape(-1, Kp, PANEL).float() - _OFFSET[8]
        return values * scale[:, None]
    groups = panels.view(panels.shape[0], Kp // GROUP, -1)  # [panels, groups, bytes]
    scale = groups[..., : PANEL * 2].contiguous().view(torch.bfloat16).float()
    octets = groups[..., PANEL * 2 :].reshape(*scale.shape[:2], GROUP // 8, PANEL, 4)
    octets = octets.transpose(3, 4)  # [panels, groups, 4, 4 columns, 64]
    values = torch.cat([octets & 15, octets >> 4], dim=3).flatten(2, 3).float() - _OFFSET[4]
    return (values * scale[:, :, None]).reshape(-1, Kp, PANEL)


def operand(x: Tensor, bits: int) -> Tensor:
    """x [R, Kp] as the products with a matrix of that format see it, float32.

    float64 passes unrounded: it is the oracle. A group of 32 columns that is not finite gives NaN.
    """
    if bits == 32 or x.dtype == torch.float64:
        return x
    if bits == 16:
        return x.bfloat16().float()
    groups = x.view(x.shape[0], -1, GROUP)
    most = groups.abs().amax(2, keepdim=True)
    values = (groups * (127 / torch.where(most < _LEAST, 1.0, most))).round()
    scale = torch.where(most.isfinite(), most / 127, torch.nan)
    return (values.nan_to_num() * scale).view_as(x)


def pack_matrix(w: Tensor, bits: int) -> Tensor:
    """w [N, K] float32 -> uint8 [bytes]. NaN in w stays NaN in what `unpack` gives back."""
    N, K = w.shape
    w = torch.nn.functional.pad(w, (0, -K % COLUMNS, 0, -N % PANEL))
    panels = w.view(-1, PANEL, w.shape[1]).transpose(1, 2)  # [panels, Kp, 64]
    if bits == 32:
        return _bytes(panels).flatten()
    if bits == 16:
        pairs = panels.bfloat16().unflatten(1, (-1, 2)).transpose(2, 3)  # [panels, Kp/2, 64, 2]
        return _bytes(pairs).flatten()
    if bits == 8:
        scale = panels.abs().amax(1) / 127  # [panels, 64]
        values = (panels / _divisor(scale)[:, None]).round().clamp(-127, 127)
        # NaN is kept by the scale
        quads = (values + _OFFSET[8]).nan_to_num().to(torch.uint8).unflatten(1, (-1, 4))
        return torch.cat([_bytes(scale), quads.transpose(2, 3).flatten(1)], dim=1).flatten()
    groups = panels.reshape(panels.shape[0], -1, GROUP, PANEL)  # [panels, groups, 32, 64]
    scale, values = _int4(groups)
    octets = values.unflatten(2, (-1, 2, 4))  # [panels, groups, 4, low or high, 4, 64]
    octets = octets[:, :, :, 0] | octets[:, :, :, 1] << 4
    return torch.cat([_bytes(scale), octets.transpose(3, 4).flatten(2)], dim=2).flatten()


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _divisor(scale: Tensor) -> Tensor:
    """1 where the scale is 0: a row of zeros stays one."""
    return torch.where(scale == 0, 1.0, scale)


def _int4(groups: Tensor) -> tuple[Tensor, Tensor]:
    """[panels, groups, 32, 64] -> bfloat16 scales [panels, groups, 64], nibbles uint8."""
    found = [_int4_search(some) for some in groups.flatten(0, 1).split(_INT4_CHUNK)]
    scales, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    return scales.view(groups[:, :, 0].shape), values.view(groups.shape)


def _int4_search(groups: Tensor) -> tuple[Tensor, Tensor]:
    """[n, 32, 64] -> bfloat16 scales [n, 64] with the least squared error, nibbles uint8.

    The extreme value of a group becomes -8, so a scale has the sign that makes it negative. The
    first of equals wins; NaN in a group stays NaN in its scale.
    """
    low, high = groups.amin(1), groups.amax(1)
    extreme = torch.where(-low > high, low, high)  # [n, 64]
    best, least = (extreme / -8).bfloat16(), torch.full_like(extreme, torch.inf)
    for trial in range(len(_INT4_SCALES) + _INT4_FITS):
        if trial < len(_INT4_SCALES):
            scale = extreme / -8 * _INT4_SCALES[trial]
        else:
            values = _int4_round(groups, best)
            scale = (values * groups).sum(1) / _divisor(values.square().sum(1))
        scale = scale.bfloat16()
        off = (_int4_round(groups, scale) * scale.float()[:, None]).sub_(groups)
        error = off.square_().sum(1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best, (_int4_round(groups, best) + _OFFSET[4]).nan_to_num().to(torch.uint8)


def _int4_round(groups: Tensor, scale: Tensor) -> Tensor:
    """The values -8..7 of groups [n, 32, 64] by scales [n, 64]."""
    return (groups / _divisor(scale.float())[:, None]).round_().clamp_(-8, 7)
