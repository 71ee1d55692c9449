"""The quantizer modules: taming's interface and numbers, remapping, Gumbel, EMA."""

import os
import tempfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import vqfast
from vqfast.nn import EMAVectorQuantizer, GumbelQuantizer, VectorQuantizer


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def textbook(z, weight, beta, legacy):
    """z [B, D, h, w] -> z_q, loss, flat indices: the published formula in float64."""
    rows = z.movedim(1, -1)
    indices = torch.cdist(rows.reshape(-1, z.shape[1]), weight).argmin(1)
    z_q = F.embedding(indices, weight).view(rows.shape)
    commitment, codes = (z_q.detach() - rows).square().mean(), (z_q - rows.detach()).square().mean()
    loss = commitment + beta * codes if legacy else beta * commitment + codes
    return (rows + (z_q - rows).detach()).movedim(-1, 1), loss, indices


# ---- VectorQuantizer


@pytest.mark.parametrize(("legacy", "sane"), [(True, False), (False, True)])
def test_vector_quantizer_gives_tamings_numbers(legacy, sane):
    q = VectorQuantizer(70, 5, 0.25, legacy=legacy, sane_index_shape=sane)
    assert list(q.state_dict()) == ["embedding.weight"]
    assert q.embedding.weight.abs().max() <= 1 / 70
    q.embedding.weight.data = normal(1, 70, 5)
    z, upstream = normal(2, 2, 5, 6, 9).requires_grad_(), normal(3, 2, 5, 6, 9)
    z_q, loss, (perplexity, encodings, indices) = q(z)
    (loss * 1.7 + (z_q * upstream).sum()).backward()

    z64, w64 = (t.detach().double().requires_grad_() for t in (z, q.embedding.weight))
    expected_q, expected_loss, expected = textbook(z64, w64, 0.25, legacy)
    (expected_loss * 1.7 + (expected_q * upstream.double()).sum()).backward()
    assert torch.equal(indices, expected.view(2, 6, 9) if sane else expected)
    assert encodings is None
    torch.testing.assert_close(z_q.double(), expected_q, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(z.grad.double(), z64.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(q.embedding.weight.grad.double(), w64.grad, rtol=1e-5, atol=1e-7)
    share = torch.bincount(expected, minlength=70) / len(expected)
    entropy = torch.special.entr(share).sum()
    torch.testing.assert_close(perplexity, entropy.exp())
    assert torch.equal(q.codes(z), expected.view(2, 6, 9))


def test_codebook_entries_follow_the_order_b_h_w():
    q = VectorQuantizer(70, 5, 0.25)
    indices = torch.randint(70, (24,))
    entry = q.get_codebook_entry(indices, (2, 3, 4, 5))
    assert entry.shape == (2, 5, 3, 4) and entry.is_contiguous()
    assert torch.equal(entry[1, :, 2, 3], q.embedding.weight[indices[23]])
    assert torch.equal(entry[0, :, 1, 2], q.embedding.weight[indices[6]])
    assert torch.equal(q.get_codebook_entry(indices, None), q.embedding.weight[indices])


@pytest.mark.parametrize(
    ("indices", "shape", "kind", "text"),
    [
        (torch.tensor([70]), (1, 1, 1, 5), ValueError, "0..69.*70"),
        (torch.tensor([-1]), (1, 1, 1, 5), ValueError, "0..69.*-1"),
        (torch.tensor([1.0]), (1, 1, 1, 5), TypeError, "indices.*float32"),
        (torch.tensor([1]), (1, 2, 1, 5), ValueError, r"shape.*\(1, 2, 1, 5\)"),
        (torch.tensor([1]), (1, 5, 1, 1), ValueError, r"shape.*\(1, 5, 1, 1\)"),
    ],
)
def test_wrong_codes_are_refused(indices, shape, kind, text):
    with pytest.raises(kind, match=text):
        VectorQuantizer(70, 5, 0.25).get_codebook_entry(indices, shape)


@pytest.mark.parametrize(
    ("z", "kind", "text"),
    [
        (torch.zeros(2, 4, 3, 3), ValueError, r"z must be \[B, 5"),
        (torch.zeros(2, 5), ValueError, "z.*dimensions"),
        (torch.zeros(2, 5, 3, 3, dtype=torch.int64), TypeError, "z.*int64"),
        ([1.0], TypeError, "z.*list"),
    ],
)
def test_wrong_latents_are_refused(z, kind, text):
    for q in (
        VectorQuantizer(7, 5, 0.25),
        EMAVectorQuantizer(7, 5, 0.25),
        GumbelQuantizer(5, 5, 7),
    ):
        with pytest.raises(kind, match=text):
            q.codes(z)


def test_gumbel_arguments_are_refused_by_the_vector_quantizer():
    q, z = VectorQuantizer(7, 5, 0.25), normal(1, 1, 5, 2, 2)
    q(z, temp=1.0)
    for options in ({"temp": 0.5}, {"rescale_logits": True}, {"return_logits": True}):
        with pytest.raises(ValueError, match="Gumbel"):
            q(z, **options)


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_other_metrics_in_search_and_lookup(metric):
    q = VectorQuantizer(50, 6, 0.25, metric=metric, sane_index_shape=True)
    z = normal(1, 2, 6, 3, 4)
    z_q, _, (_, _, indices) = q(z)
    assert torch.equal(indices, vqfast.nearest(z.movedim(1, -1), q.embedding.weight, metric=metric))
    assert torch.equal(z_q, q.get_codebook_entry(indices, (2, 3, 4, 6)))
    if metric == "cosine":
        torch.testing.assert_close(z_q.norm(dim=1), torch.ones(2, 3, 4))


@pytest.mark.parametrize("make", [VectorQuantizer, EMAVectorQuantizer])
def test_the_search_is_float32_under_autocast_and_in_half(make):
    q = make(300, 16, 0.25, sane_index_shape=True).eval()
    z = normal(1, 2, 16, 5, 5)
    expected = vqfast.nearest(z.movedim(1, -1), q.embedding.weight)
    with torch.autocast("cpu", torch.bfloat16):
        z_q, loss, (_, _, indices) = q(z)
    assert torch.equal(indices, expected) and z_q.dtype == loss.dtype == torch.float32
    z_q, loss, (_, _, indices) = q(z.bfloat16())
    assert z_q.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert torch.equal(indices, vqfast.nearest(z.bfloat16().movedim(1, -1), q.embedding.weight))


# ---- remapping

USED = [40, 3, 17]


def _remapped(unknown, **options):
    q = VectorQuantizer(50, 6, 0.25, remap=USED, unknown_index=unknown, **options)
    q.embedding.weight.data = normal(1, 50, 6)
    return q


def _latents_of(q, codes):
    """[1, 6, n, 1] that quantise to `codes`."""
    return q.embedding.weight.data[torch.tensor(codes)].T[None, :, :, None].clone()


def test_remap_gives_dense_ids_and_back():
    q = _remapped("extra")
    assert q.re_embed == 4 and q.state_dict()["used"].tolist() == USED
    *_, (_, _, indices) = q(_latents_of(q, [17, 5, 40, 3]))
    assert indices.shape == (4, 1) and indices[:, 0].tolist() == [2, 3, 0, 1]
    assert q.codes(_latents_of(q, [17, 5, 40, 3])).tolist() == [[[2], [3], [0], [1]]]
    entry = q.get_codebook_entry(torch.tensor([2, 3, 0, 1]), (1, 4, 1, 6))
    assert torch.equal(entry, _latents_of(q, [17, 40, 40, 3]))
    with pytest.raises(ValueError, match="0..3"):
        q.get_codebook_entry(torch.tensor([4]), (1, 1, 1, 6))


def test_unknown_codes_become_an_id_or_a_random_one():
    fixed = _remapped(1, sane_index_shape=True)
    *_, (_, _, indices) = fixed(_latents_of(fixed, [5, 40]))
    assert indices.tolist() == [[[1], [0]]]
    q = _remapped("random")
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(q.codes(_latents_of(q, [5] * 200)).reshape(-1))
    assert sorted(set(draws[0].tolist())) == [0, 1, 2]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_remap_reads_npy_files_but_no_pickles():
    with tempfile.TemporaryDirectory() as folder:
        good, bad = os.path.join(folder, "used.npy"), os.path.join(folder, "bad.npy")
        np.save(good, np.array(USED))
        np.save(bad, np.array([{"a": 1}], dtype=object), allow_pickle=True)
        assert VectorQuantizer(50, 6, 0.25, remap=good).used.tolist() == USED
        with pytest.raises(ValueError, match="allow_pickle"):
            VectorQuantizer(50, 6, 0.25, remap=bad)


@pytest.mark.parametrize("remap", [[50], [-1], [], [[1, 2]]])
def test_ids_outside_the_codebook_are_refused(remap):
    with pytest.raises((ValueError, TypeError), match="remap"):
        VectorQuantizer(50, 6, 0.25, remap=remap)


# ---- Gumbel


def _gumbel(**options):
    torch.manual_seed(1)
    return GumbelQuantizer(6, 4, 40, kl_weight=0.1, **options)


def test_gumbel_in_evaluation_is_the_noise_free_argmax():
    q, z = _gumbel().eval(), normal(2, 2, 6, 5, 7)
    assert sorted(q.state_dict()) == ["embed.weight", "proj.bias", "proj.weight"]
    logits = F.conv2d(z, q.proj.weight, q.proj.bias)
    z_q, loss, (_, _, indices) = q(z)
    assert torch.equal(indices, logits.argmax(1)) and torch.equal(q.codes(z), indices)
    assert torch.equal(z_q, q.get_codebook_entry(indices.reshape(-1), (2, 5, 7, 4)))
    p = logits.double().softmax(1)
    expected = 0.1 * (p * torch.log(p * 40)).sum(1).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert torch.equal(q(z)[0], z_q)


def test_gumbel_in_training_draws_from_the_softmax():
    q = _gumbel()
    q.proj.weight.data.zero_()
    q.proj.bias.data = torch.tensor([0.0, 1.0, 2.0] + [-30.0] * 37)
    *_, (_, _, indices) = q(torch.zeros(4, 6, 30, 30))
    share = torch.bincount(indices.reshape(-1), minlength=40)[:3] / indices.numel()
    expected = torch.tensor([0.0, 1.0, 2.0]).softmax(0)
    assert (share - expected).abs().max() < 4 * (0.25 / indices.numel()) ** 0.5
    again = []
    for _ in range(2):
        torch.manual_seed(5)
        again.append(q(torch.zeros(1, 6, 9, 9))[2][2])
    assert torch.equal(*again)


def test_gumbel_gradients_reach_projection_and_codebook():
    for straight in (True, False):
        q, z = _gumbel(straight_through=straight), normal(2, 2, 6, 3, 3).requires_grad_()
        z_q, loss, _ = q(z, temp=0.7)
        if straight:  # one code per place
            rows = z_q.movedim(1, -1).reshape(-1, 4)
            assert (torch.cdist(rows, q.embed.weight).min(1).values < 1e-5).all()
        (z_q.square().sum() + loss).backward()
        assert all(p.grad.abs().sum() > 0 for p in (z, q.proj.weight, q.embed.weight))


def test_gumbel_returns_and_refusals():
    q, z = _gumbel(use_vqinterface=False), normal(2, 1, 6, 2, 2)
    assert len(q(z)) == 3 and q(z)[2].dtype == torch.int64
    with pytest.raises(ValueError, match="use_vqinterface"):
        q(z, return_logits=True)
    *_, logits = _gumbel()(z, return_logits=True)
    assert logits.shape == (1, 40, 2, 2)
    with pytest.raises(ValueError, match="temp"):
        _gumbel()(z, temp=0.0)


def test_gumbel_remap_chooses_kept_codes_only():
    q = _gumbel(remap=[39, 3, 17])
    z = normal(2, 2, 6, 5, 7)
    for mode in (True, False):
        z_q, _, (_, _, indices) = q.train(mode)(z)
        assert set(indices.unique().tolist()) <= {0, 1, 2}
        entry = q.get_codebook_entry(indices.reshape(-1), (2, 5, 7, 4))
        torch.testing.assert_close(z_q, entry)


# ---- EMA


def _started(K=4, D=2, **options):
    """An EMA quantizer whose first codes are set by hand: (0,0), (10,0), (0,10), (10,10)."""
    q = EMAVectorQuantizer(K, D, 0.25, **{"decay": 0.9, "eps": 1e-5, **options})
    codes = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    q.embedding.weight.copy_(codes)
    q.embedding.embed_avg.copy_(codes)
    q.embedding.cluster_size.fill_(1.0)
    return q


def test_ema_update_is_the_published_one():
    q = _started(dead_code_threshold=0.0)
    rows = torch.tensor([[1.0, 1.0], [3.0, 0.0], [9.0, 1.0], [1.0, 9.0]])
    z_q, loss, (perplexity, _, indices) = q(rows.T.reshape(1, 2, 4, 1))
    assert indices.tolist() == [0, 0, 1, 2]
    codes = torch.tensor([[0.0, 0.0], [0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    assert torch.equal(z_q[0, :, :, 0].T, codes)  # from before the update
    torch.testing.assert_close(loss, 0.25 * (codes - rows).square().mean())
    n = 0.9 + 0.1 * torch.tensor([2.0, 1.0, 1.0, 0.0])
    s = 0.9 * torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    s += 0.1 * torch.tensor([[4.0, 1.0], [9.0, 1.0], [1.0, 9.0], [0.0, 0.0]])
    smooth = (n + 1e-5) / (n.sum() + 4e-5) * n.sum()
    torch.testing.assert_close(q.embedding.cluster_size, n)
    torch.testing.assert_close(q.embedding.weight, s / smooth[:, None])
    torch.testing.assert_close(perplexity, torch.tensor([0.5, 0.25, 0.25]).log().mul(
        torch.tensor([0.5, 0.25, 0.25])).sum().neg().exp())  # fmt: skip


def test_ema_loss_trains_the_encoder_alone():
    q = _started()
    z = normal(1, 2, 2, 3, 3).requires_grad_()
    assert not list(q.parameters())
    kept = q.embedding.weight.clone()
    _, loss, (_, _, indices) = q(z)
    loss.backward()
    rows = z.detach().movedim(1, -1)
    expected = 0.25 * 2 * (rows - kept[indices].view(rows.shape)) / z.numel()
    torch.testing.assert_close(z.grad.movedim(1, -1), expected)


def test_ema_stands_still_outside_of_training():
    q = _started().eval()
    before = {k: v.clone() for k, v in q.state_dict().items()}
    q(normal(1, 1, 2, 4, 4))
    q.train().codes(normal(1, 1, 2, 4, 4))
    assert all(torch.equal(v, before[k]) for k, v in q.state_dict().items())


def test_unused_codes_keep_their_place_until_they_are_revived():
    q = _started(dead_code_threshold=0.05)
    z = torch.zeros(1, 2, 8, 8) + 0.1 * normal(1, 1, 2, 8, 8)  # only code 0 is used
    steps = 0
    while steps < 60:
        steps += 1
        before = q.embedding.weight.clone()
        q(z)
        if not torch.allclose(q.embedding.weight[3], before[3], atol=1e-2):
            break
    assert 2 < steps < 60
    assert q.embedding.weight.abs().max() < 1  # all three moved onto latents
    again = _started(dead_code_threshold=0.05)
    torch.manual_seed(0)
    for _ in range(60):
        again(z)
    assert again.embedding.weight.isfinite().all() and again.embedding.weight.abs().max() < 1


def test_first_codes_come_from_the_first_batch():
    q, z = EMAVectorQuantizer(8, 3, 0.25), 100 + normal(1, 2, 3, 5, 5)
    torch.manual_seed(0)
    _, _, (perplexity, _, _) = q(z)
    assert perplexity > 5
    assert (q.embedding.weight - 100).abs().max() < 5
    other = EMAVectorQuantizer(8, 3, 0.25)
    torch.manual_seed(0)
    other(z)
    assert torch.equal(other.embedding.weight, q.embedding.weight)
    loaded = EMAVectorQuantizer(8, 3, 0.25)
    loaded.load_state_dict(q.state_dict())
    loaded(z + 50)  # continues, does not start again
    assert (loaded.embedding.weight - 100).abs().max() < 30


def test_rows_that_are_not_finite_never_reach_the_codebook():
    clean, sick = _started(), _started()
    z = normal(1, 1, 2, 4, 4)
    bad = torch.cat([z, torch.full((1, 2, 1, 4), float("nan"))], dim=2)
    clean(z)
    _, loss, _ = sick(bad)
    assert loss.isnan()
    torch.testing.assert_close(sick.embedding.weight, clean.embedding.weight)
    untouched = _started()
    untouched(torch.full((1, 2, 2, 2), float("inf")))
    assert torch.equal(untouched.embedding.cluster_size, torch.ones(4))


def test_ema_averages_stay_float32_in_a_half_model():
    q = EMAVectorQuantizer(8, 3, 0.25).half()
    assert {b.dtype for b in q.buffers()} == {torch.float32}
    assert {b.dtype for b in q.double().buffers()} == {torch.float64}


def _rank(rank, folder, out):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    torch.manual_seed(rank)  # ranks draw differently; the codebook must not differ
    q = EMAVectorQuantizer(6, 2, 0.25, decay=0.5, dead_code_threshold=0.5)
    for step in range(3):
        q(normal(10 * step + rank, 1, 2, 4, 4))
    torch.save(q.state_dict(), f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow  # two processes that import torch
def test_two_ranks_hold_the_same_codebook(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path), str(tmp_path)), nprocs=2)
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert a["embedding.cluster_size"].sum() > 10  # counts of both: 32 rows a step, not 16
