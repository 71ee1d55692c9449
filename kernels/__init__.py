"""Triton kernels, one file per op; installed as `vqfast.kernels` and loaded by name, op by op.

`<file>.<op>(*inputs, *outputs) -> None` launches; `<file>.unsupported_<op>(*inputs)` gives the
reason why inputs cannot
run, or None. Kernels import torch, triton and `_tuning` alone: nothing of vqfast, and never one
another.
"""

if (
    __name__ != "vqfast.kernels"
):  # another package has this name; one file under two names is two modules
    raise ImportError("kernels/ is installed as vqfast.kernels; import it under that name")
