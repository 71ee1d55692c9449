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

# Codes of a whole encoder: one of a few hundred may lie on an edge that any rounding crosses, so
# FORWARD times what plain torch gets wrong needs a floor.
NETWORK_CODES = 0.02

# Losses of the first two training steps, relative to plain torch in float32. Adam's first update
# is the sign of each gradient, so rounding moves weights whose gradient is all error: between three
# implementations up to 5e-4 was seen in float32, 2e-2 under autocast.
FIRST_LOSSES = {torch.float32: 3e-3, torch.bfloat16: 5e-2}

# First loss of a GPT, relative to another implementation of it: rounding of the dtype, averaged
# over 256 tokens and more.
SAME_LOSS = {torch.float32: 1e-5, torch.bfloat16: 2e-3}
