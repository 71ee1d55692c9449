"""THE error budgets. Loosening one is a commit of its own, with its reason.

BUDGET        |out - exact| <= factor x |plain - exact| + eps x |exact|, maximum norms, where
              `plain` is torch at the same dtype and `exact` the reference in float64. The factors
              are the contract's.
EXACT         integers: equal to the reference at the same dtype.
NEAREST       the contract's float64 rule: regret of at most 1e-12, lowest index on ties.
DISTRIBUTION  support exactly; chi-square with a fixed seed, p > 1e-6.
"""

import torch

FORWARD = 2.0  # flash-attention's rule for outputs, against float64
BACKWARD = 3.0  # and for gradients
EPS = {t: torch.finfo(t).eps for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
NEAREST_REGRET = 1e-12
CHI_SQUARE_P = 1e-6

# Outputs that carry float32 accumulations whatever the dtype of the inputs: their eps is float32's,
# and their plain error may be zero by luck on tiny shapes, so the budget adds this multiple of the
# largest exact value.
STATISTICS_EPS = 4 * EPS[torch.float32]
