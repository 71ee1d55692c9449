"""Two processes train one model: equal weights, averaged gradients, steps refused together."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vqfast.models.vqgan import VQGANConfig
from vqfast.train.distributed import World
from vqfast.train.settings import DataSection, LossSection, TokenizerTrain
from vqfast.train.stage import BadStep
from vqfast.train.tokenizer import TokenizerConfig, TokenizerStage


def config(quantizer, disc_factor, mode="shared"):
    model = VQGANConfig(
        ch=32,
        ch_mult=(1, 1),
        num_res_blocks=1,
        attn_resolutions=(),
        attn_type="none",
        resolution=8,
        z_channels=8,
        n_embed=16,
        embed_dim=4,
        quantizer=quantizer,
        dead_code_threshold=0.0,
    )
    loss = LossSection(
        perceptual_weight=0.0,
        disc_start=1,
        disc_channels=8,
        disc_num_layers=1,
        disc_factor=disc_factor,
        disc_norm="actnorm",
    )
    train = TokenizerTrain(
        learning_rate=1e-3,
        discriminator_pass=mode,
        accumulate=2,
        ema_decay=0.9,
        revive_after=2 if quantizer == "vq" else 0,
    )
    return TokenizerConfig(model, loss, DataSection(size=8, batch_size=2), train)


def batches(step, rank):
    noise = torch.Generator().manual_seed(100 * step + rank)
    return [
        {"image": torch.rand(2, 3, 8, 8, generator=noise) * 2 - 1, "label": torch.zeros(2)}
        for _ in range(2)
    ]


def work(rank, folder, settings, spoilt):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.manual_seed(rank)  # different weights, until they are made equal
    stage = TokenizerStage(settings, World(rank, 2, torch.device("cpu")), None)
    refused = []
    for step in range(4):
        given = batches(step, rank)
        if spoilt and rank == 1 and step == 2:
            given[0]["image"][0] = float("nan")
        try:
            stage.step(step, given)
        except BadStep as error:
            refused.append((step, error.component))
    torch.save((stage.tensors(), refused), folder / f"{rank}.pt")
    dist.destroy_process_group()


def together(tmp_path, settings, spoilt=False):
    mp.start_processes(work, (tmp_path, settings, spoilt), nprocs=2, start_method="fork")
    return [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(
    ("quantizer", "mode", "spoilt"),
    [
        pytest.param("vq", "shared", False, marks=pytest.mark.slow),
        ("vq", "taming", True),
        ("ema", "taming", False),
    ],
)
def test_ranks_stay_equal_and_refuse_together(tmp_path, quantizer, mode, spoilt):
    (one, refused), (other, also) = together(tmp_path, config(quantizer, 1.0, mode), spoilt)
    assert refused == also == ([(2, "rec")] if spoilt else [])
    different = [n for n in one if not torch.equal(one[n], other[n])]
    assert not different
    assert all(x.isfinite().all() for x in one.values() if x.is_floating_point())


def test_two_ranks_are_one_process_with_their_batches(tmp_path):
    settings = config("vq", 0.0)
    settings.train.revive_after = 0
    (found, _), _ = together(tmp_path, settings)
    torch.manual_seed(0)
    settings.train.accumulate = 4
    alone = TokenizerStage(settings, World(0, 1, torch.device("cpu")), None)
    start = {n: x.clone() for n, x in alone.tensors().items()}
    for step in range(4):
        alone.step(step, batches(step, 0) + batches(step, 1))
    name = "weights.model.decoder.conv_in.weight"
    moved = float((alone.tensors()[name] - start[name]).abs().mean())
    assert float((alone.tensors()[name] - found[name]).abs().mean()) < 0.02 * moved
