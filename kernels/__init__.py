"""Triton kernels, one file per op; installed as `vqfast.kernels` and loaded by name, op by op.

`<file>.<op>(*inputs, *outputs, *scratch) -> None` launches; `<file>.unsupported_<op>(*inputs)`
gives the reason why inputs cannot run, or None; `<file>.scratch_<op>(*inputs)` makes the scratch
memory of an op that needs some. Kernels import torch, triton, `_tuning` and private parts of their
own op (`_nearest_screen`): nothing of vqfast, and never one another.
"""

if (
    __name__ != "vqfast.kernels"
):  # another package has this name; one file under two names is two modules
    raise ImportError("kernels/ is installed as vqfast.kernels; import it under that name")
