"""The Triton step of a GPT as compiled for sm_80 and sm_90; needs no GPU. What holds of every
kernel is in test_triton_compile.py, and so are the shapes."""

import pytest

pytest.importorskip("triton")

from test_triton_compile import compiled  # noqa: E402, F401  (a fixture)


def products(compiled, arch):  # noqa: F811
    """Bits and kernel of every packed matrix that the step multiplies by rows."""
    for inputs, k in compiled("decode_step", arch):
        if k.name not in ("decode_step_embedding", "decode_step_attention"):
            yield inputs[9], k


@pytest.mark.parametrize("arch", (80, 90))
def test_the_step_adds_in_one_order_whatever_its_rows(compiled, arch):  # noqa: F811
    """Blocks of 16, 32 and 64 rows use one tensor-core instruction, 16 columns of the sum at a
    time; float32 uses none."""
    blocks = set()
    for bits, k in products(compiled, arch):
        found = {o for o, _, _ in k.instructions() if o.startswith(("HMMA", "HGMMA"))}
        assert found == ({"HMMA.16816.F32.BF16"} if bits < 32 else set()), k.report
        blocks.add((bits < 32, k.constants["BLOCK_R"]))
    assert blocks == {(False, 16), (False, 32), (True, 16), (True, 32), (True, 64)}


@pytest.mark.parametrize("arch", (80, 90))
def test_the_step_copies_weights_16_bytes_at_a_time(compiled, arch):  # noqa: F811
    """By asynchronous copies; fewer bytes where a thread has fewer."""
    for bits, k in products(compiled, arch):
        loop = k.loop_around("HMMA" if bits < 32 else "FFMA")
        size = k.constants["BLOCK_K"] * k.constants["M"] * bits // 8
        each = size / 32 / k.options["num_warps"]  # bytes of a thread
        copies = [o for o in loop if o.startswith("LDGSTS") and (each < 16 or "128" in o)]
        assert len(copies) >= max(1, each / 16), k.report


@pytest.mark.parametrize("arch", (80, 90))
def test_the_step_overlaps_its_launches_on_hopper(compiled, arch):  # noqa: F811
    """It lets the next kernel begin, asks for weights, and waits for the one before, in this
    order."""
    asking = {id(k) for _, k in products(compiled, arch)}
    for _, k in compiled("decode_step", arch):
        order = [o for o, _, _ in k.instructions()]
        assert order.count("PREEXIT") == order.count("ACQBULK") == (arch >= 90), k.report
        if arch >= 90:
            wait = order.index("ACQBULK")
            assert order.index("PREEXIT") < wait, k.report
            before = any(o.startswith("CCTL.E.PF2") for o in order[:wait])
            assert before == (id(k) in asking), k.report
            assert not any(o.startswith(("LDG", "ST")) for o in order[:wait]), k.report
