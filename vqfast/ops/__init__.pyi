# Written by `python -m vqfast.testing.stubs`.
from types import ModuleType

from vqfast.ops.causal_attention import causal_attention as causal_attention
from vqfast.ops.code_order import code_order as code_order
from vqfast.ops.code_stats import code_stats as code_stats
from vqfast.ops.conv3x3 import conv3x3 as conv3x3
from vqfast.ops.conv3x3_down import conv3x3_down as conv3x3_down
from vqfast.ops.conv3x3_stats import conv3x3_stats as conv3x3_stats
from vqfast.ops.conv3x3_weight import conv3x3_weight as conv3x3_weight
from vqfast.ops.conv_few import conv_few as conv_few
from vqfast.ops.conv_few_input import conv_few_input as conv_few_input
from vqfast.ops.conv_few_weight import conv_few_weight as conv_few_weight
from vqfast.ops.cross_entropy import cross_entropy as cross_entropy
from vqfast.ops.decode_attention import decode_attention as decode_attention
from vqfast.ops.decode_step import decode_step as decode_step
from vqfast.ops.ema_stats import ema_stats as ema_stats
from vqfast.ops.ema_update import ema_update as ema_update
from vqfast.ops.full_attention import full_attention as full_attention
from vqfast.ops.group_norm_silu import group_norm_silu as group_norm_silu
from vqfast.ops.group_norm_silu_apply import group_norm_silu_apply as group_norm_silu_apply
from vqfast.ops.nearest import nearest as nearest
from vqfast.ops.nearest_quantize import nearest_quantize as nearest_quantize
from vqfast.ops.quantize import quantize as quantize
from vqfast.ops.sample_logits import sample_logits as sample_logits
from vqfast.ops.straight_through import straight_through as straight_through

def load_all() -> dict[str, ModuleType]: ...
