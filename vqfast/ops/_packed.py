"""The packed weights of `decode_step`: panels of 16 rows in float32, bfloat16, int8 or int4.

A matrix [N, K] is cut into panels of 16 rows, with K padded to a multiple of 64 and N to one of
16 by zeros. A panel holds, column by column, the 16 values of a column side by side:

    bits 32  float32                      bits 16  bfloat16
    bits 8   16 float32 row scales, then int8
    bits 4   per 32 columns: 16 bfloat16 scales, then 16 bytes for each two columns, value + 8,
             the even column in the low nibble
"""

import torch
from torch import Tensor

LAYOUT = 1  # version of the description above, stored with packed weights in files
PANEL = 16  # rows of a panel
COLUMNS = 64  # K is padded to a multiple
GROUP = 32  # columns that share an int4 scale
# int4 scales that are tried, as parts of the one that just holds the largest value of a group: a
# smaller step for all may pay for clipping one
_INT4_SCALES = (1.0, 0.93, 0.86, 0.79)


def padded(n: int, to: int) -> int:
    return -(-n // to) * to


def panel_bytes(K: int, bits: int) -> int:
    Kp = padded(K, COLUMNS)
    scales = {32: 0, 16: 0, 8: PANEL * 4, 4: Kp // GROUP * PANEL * 2}[bits]
    return PANEL * Kp * bits // 8 + scales


def matrix_bytes(N: int, K: int, bits: int) -> int:
    return padded(N, PANEL) // PANEL * panel_bytes(K, bits)


def unpack(packed: Tensor, N: int, K: int, bits: int) -> Tensor:
    """One packed matrix as float32 [panels, Kp, 16]: element [p, k, r] is row 16·p + r, column
    k.
    """
    Kp = padded(K, COLUMNS)
    panels = packed.view(-1, panel_bytes(K, bits))  # [panels, bytes]
    if bits == 32:
        return panels.view(torch.float32).view(-1, Kp, PANEL)
    if bits == 16:
        return panels.view(torch.bfloat16).view(-1, Kp, PANEL).float()
    if bits == 8:
        scale = panels[:, : PANEL * 4].contiguous().view(torch.float32)  # [panels, 16]
        values = panels[:, PANEL * 4 :].contiguous().view(torch.int8)
        return values.view(-1, Kp, PANEL).float() * scale[:, None]
    groups = panels.view(panels.shape[0], Kp // GROUP, -1)  # [panels, groups, bytes]
    scale = groups[..., : PANEL * 2].contiguous().view(torch.bfloat16).float()
    pairs = groups[..., PANEL * 2 :].reshape(*scale.shape[:2], GROUP // 2, 1, PANEL)
    values = torch.cat([pairs & 15, pairs >> 4], dim=3).float() - 8  # even column, odd column
    return (values * scale[:, :, None, None]).reshape(-1, Kp, PANEL)


def pack_matrix(w: Tensor, bits: int) -> Tensor:
    """w [N, K] float32 -> uint8 [bytes]. NaN in w stays NaN in what `unpack` gives back."""
    N, K = w.shape
    w = torch.nn.functional.pad(w, (0, -K % COLUMNS, 0, -N % PANEL))
    panels = w.view(-1, PANEL, w.shape[1]).transpose(1, 2)  # [panels, Kp, 16]
    if bits == 32:
        return _bytes(panels).flatten()
    if bits == 16:
        return _bytes(panels.bfloat16()).flatten()
    if bits == 8:
        scale = panels.abs().amax(1) / 127  # [panels, 16]
        values = (panels / _divisor(scale)[:, None]).round().clamp(-127, 127)
        parts = [_bytes(scale), _bytes(values.to(torch.int8)).flatten(1)]
        return torch.cat([part.flatten(1) for part in parts], dim=1).flatten()
    groups = panels.reshape(panels.shape[0], -1, GROUP, PANEL)  # [panels, groups, 32, 16]
    scale, values = _int4(groups)
    pairs = (values[:, :, 0::2] | values[:, :, 1::2] << 4).flatten(2)  # [panels, groups, 256]
    return torch.cat([_bytes(scale), pairs], dim=2).flatten()


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _divisor(scale: Tensor) -> Tensor:
    """1 where the scale is 0: a row of zeros stays one."""
    return torch.where(scale == 0, 1.0, scale)


def _int4(groups: Tensor) -> tuple[Tensor, Tensor]:
    """[panels, groups, 32, 16] -> bfloat16 scales [panels, groups, 16], nibbles uint8.

    The extreme value of a group becomes -8, so a scale has the sign that makes it negative. Of a
    few smaller scales the one with the least squared error wins, the first of equals.
    """
    low, high = groups.amin(2), groups.amax(2)
    extreme = torch.where(-low > high, low, high)  # [panels, groups, 16]; NaN if there is one
    best_scale = best_values = best_error = None
    for part in _INT4_SCALES:
        scale = (extreme / -8 * part).bfloat16()
        step = scale.float()[:, :, None]
        values = (groups / _divisor(step)).round().clamp(-8, 7)
        error = ((values * step - groups) ** 2).sum(2)
        if best_error is None:
            best_scale, best_values, best_error = scale, values, error
            continue
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_values = torch.where(better[:, :, None], values, best_values)
        best_error = torch.where(better, error, best_error)
    return best_scale, (best_values + 8).nan_to_num().to(torch.uint8)
