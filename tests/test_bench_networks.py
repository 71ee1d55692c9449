"""The bench's suites `model` and `train`: opponents compute what we do, or they are not timed."""

import time
from pathlib import Path

import pytest
import torch

from vqfast import VQGAN, VQGANConfig
from vqfast.losses import LPIPS, NLayerDiscriminator

BENCH = Path(__file__).resolve().parent.parent / "bench"
TINY = VQGANConfig(
    ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(16,), resolution=32,
    z_channels=32, embed_dim=8, n_embed=64,
)  # fmt: skip
SPREAD = {"quantize.embedding.weight": 0.5}  # codes that decide what is decoded


@pytest.fixture
def bench(monkeypatch):
    """The folder on the path, as `python bench/run.py` puts it; nothing is compiled."""
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: None)


@pytest.fixture
def inputs():
    """inputs(measure) -> those of networks.py, for a tiny network whose norms are not trivial."""
    torch.manual_seed(0)
    model = VQGAN(TINY).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if "norm" in name:
            p.add_(torch.randn_like(p), alpha=0.2)
        if name in SPREAD:
            p.normal_(0, SPREAD[name])
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    codes = torch.randint(64, (1, 16, 16))
    start = {
        "vqgan": model,
        "discriminator": NLayerDiscriminator(),
        "perceptual": LPIPS(None, net="squeeze"),
    }

    def made(measure):
        if measure == "train_tokenizer":
            return TINY, images, {k: v.state_dict() for k, v in start.items()}
        return model, images if measure == "encode" else codes

    return made


def _peers(measure, dtype, inputs, judge):
    import baselines

    told = baselines.Told("tiny", dtype, "cpu")
    return baselines.runners(
        measure,
        told,
        inputs,
        "cpu",
        chosen=lambda module: dtype in baselines.formats(module, measure),
        once=lambda run: judge.require(run, dtype),
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("measure", ["encode", "decode", "train_tokenizer"])
def test_ours_and_every_opponent_that_is_here_compute_the_same(bench, inputs, measure, dtype):
    import agreement
    import networks

    judge = agreement.Judge(measure, inputs(measure), "cpu")
    case = networks.Case("tiny", measure, lambda: inputs(measure))
    judge.require(networks._ours(case, dtype, inputs(measure), "cpu"), dtype)
    ready, missing = _peers(measure, dtype, inputs(measure), judge)
    wanted = {"torch_channels_last", "torch_compiled"}
    if measure != "train_tokenizer":
        ways = (
            ("torch_eager",) if dtype == "fp32" else ("torch_autocast", "torch_compiled_autocast")
        )
        wanted |= set(ways)
    assert wanted <= set(ready), missing
    # under pytest diffusers finds our folder of kernels where it looks for a package
    wrong = {name: why for name, why in missing.items() if "fails" in why}
    assert not wrong


@pytest.mark.parametrize("measure", ["encode", "decode", "train_tokenizer"])
def test_an_opponent_that_computes_something_else_is_not_timed(bench, inputs, measure, monkeypatch):
    import agreement
    from baselines import _plain_vqgan

    judge = agreement.Judge(measure, inputs(measure), "cpu")
    if measure == "train_tokenizer":
        judge._right_losses(False, "fp32")  # known before the fault
    right = _plain_vqgan._Residual.forward
    monkeypatch.setattr(_plain_vqgan._Residual, "forward", lambda s, x: 1.1 * right(s, x))
    judge._plain.setdefault("fp32", judge.truth if measure != "train_tokenizer" else None)
    ready, missing = _peers(measure, "fp32", inputs(measure), judge)
    assert "torch_channels_last" not in ready
    assert "WrongResultError" in missing["torch_channels_last"]


def test_results_of_another_shape_or_batch_are_wrong(bench, inputs):
    import agreement

    judge = agreement.Judge("encode", inputs("encode"), "cpu")
    right = inputs("encode")[0].encode(inputs("encode")[1])
    judge.require(lambda: right, "fp32")
    for out in (right[:, :8], right.repeat(2, 1, 1), (right + 1) % 64):
        with pytest.raises(agreement.WrongResultError):
            judge.require(lambda out=out: out, "fp32")


def test_weights_pass_to_diffusers_names_and_back_to_the_same_network(inputs, bench):
    """Every name is one of VQModel's, and each weight arrives once."""
    from baselines import diffusers_vqmodel as peer

    state = inputs("encode")[0].state_dict()
    found = peer.renamed(state, 2)
    assert len(found) == len(state)
    assert not [name for name in found if ".block." in name or "nin_shortcut" in name]
    assert {"encoder.down_blocks.1.attentions.0.to_out.0.weight",
            "decoder.up_blocks.0.upsamplers.0.conv.bias",
            "decoder.mid_block.attentions.0.group_norm.weight"} <= set(found)  # fmt: skip


def test_what_does_not_compile_in_time_is_absent_with_the_reason(bench):
    import baselines
    from baselines import _plain_vqgan

    calls = []
    run = _plain_vqgan.first_in_time(lambda: calls.append(time.sleep(3)), 1)
    with pytest.raises(baselines.Unsuitable, match="within 1 s"):
        run()
    assert not calls
    quick = _plain_vqgan.first_in_time(lambda: calls.append(time.sleep(1.2 * len(calls))), 1)
    for _ in range(2):  # only the first call is limited
        quick()
    assert len(calls) == 2


def test_compiled_opponents_take_part_at_batch_1_alone(bench, inputs):
    import baselines

    model, codes = inputs("decode")
    told = baselines.Told("tiny", "fp32", "cpu")
    with pytest.raises(baselines.Unsuitable, match="batch 1"):
        baselines.runner("torch_compiled", "decode", told, (model, codes.repeat(2, 1, 1)))


@pytest.mark.slow
def test_memory_of_a_network_is_measured_in_a_process_of_its_own(bench):
    import memory

    found = memory.extra_mib("decode", "small_64", "fp32", "torch_eager", "cpu", lambda: None)
    # one feature map of 8 x 32 x 64 x 64 alone is 4 MiB
    assert 8 < found < 400
    assert memory.extra_mib("decode", "small_64", "fp32", "nobody", "cpu", lambda: None) is None
