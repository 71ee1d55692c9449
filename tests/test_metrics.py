"""Metrics against scikit-image, scipy and closed forms."""

import math
import sys

import numpy as np
import pytest
import scipy.linalg
import torch

from vqfast import metrics
from vqfast.models.lpips import LPIPS


def _images(batch=3, height=33, width=47, noise=0.2):
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 5, width), indexing="ij")
    a = torch.stack([torch.sin(x * k + y * (k + 1)) for k in range(1, 4)]).expand(batch, 3, -1, -1)
    scale = torch.arange(1, batch + 1).view(-1, 1, 1, 1) * noise
    return a * 0.9, (a * 0.9 + torch.randn(a.shape) * scale).clamp(-1, 1)


def test_psnr_is_that_of_scikit_image():
    peers = pytest.importorskip("skimage.metrics")
    a, b = _images()
    for x, y, got in zip(a.double(), b.double(), metrics.psnr(a, b).tolist(), strict=True):
        want = peers.peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=2)
        assert got == pytest.approx(want, rel=1e-12)


def test_psnr_of_a_known_error_and_of_equal_images():
    a = torch.zeros(2, 1, 4, 4)
    b = a.clone()
    b[0] += 0.2
    got = metrics.psnr(a, b)
    assert got[0].item() == pytest.approx(20, abs=1e-5) and got[1].item() == math.inf
    assert metrics.psnr(a, b, data_range=255)[0].item() == pytest.approx(20 * math.log10(255 / 0.2))


def test_ssim_is_that_of_scikit_image_with_the_settings_of_wang():
    peers = pytest.importorskip("skimage.metrics")
    a, b = _images()
    for x, y, got in zip(a.double(), b.double(), metrics.ssim(a, b).tolist(), strict=True):
        want = peers.structural_similarity(
            x.numpy(),
            y.numpy(),
            data_range=2,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert got == pytest.approx(want, abs=1e-10)


def test_ssim_is_one_for_equal_images_and_falls_with_noise():
    a, b = _images()
    assert metrics.ssim(a, a).tolist() == pytest.approx([1, 1, 1])
    low = metrics.ssim(a, b)
    assert low[0] > low[1] > low[2]


@pytest.mark.parametrize("measure", [metrics.psnr, metrics.ssim])
def test_images_that_do_not_match_are_refused(measure):
    a = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"b must be \[1, 3, 16, 16\]"):
        measure(a, torch.zeros(1, 3, 16, 17))
    with pytest.raises(TypeError, match="b must be one of float32"):
        measure(a, torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="dimensions"):
        measure(a[0], a[0])
    with pytest.raises(ValueError, match="data_range"):
        measure(a, a, data_range=0)


def test_ssim_of_a_picture_below_its_window_is_refused():
    with pytest.raises(ValueError, match="11 x 11"):
        metrics.ssim(torch.zeros(1, 3, 10, 30), torch.zeros(1, 3, 10, 30))


def test_usage_and_perplexity():
    assert metrics.usage(torch.tensor([3, 0, 1, 0])) == 0.5
    assert metrics.perplexity(torch.full((64,), 5)) == pytest.approx(64)
    assert metrics.perplexity(torch.tensor([0, 9, 0])) == pytest.approx(1)
    assert metrics.perplexity(torch.tensor([1, 3])) == pytest.approx(4 / 27**0.25)
    assert metrics.perplexity(torch.zeros(4)) == 0
    with pytest.raises(ValueError, match="empty"):
        metrics.usage(torch.zeros(0))


def _statistics(features, parts=1):
    out = metrics.FeatureStatistics(features.shape[1])
    for part in features.chunk(parts):
        out.update(part)
    return out


def test_statistics_of_batches_are_those_of_the_whole_also_far_from_zero():
    x = torch.randn(101, 6) @ torch.randn(6, 6) + 3e4
    whole, parts = _statistics(x), _statistics(x, 7)
    assert parts.count == 101
    torch.testing.assert_close(parts.mean, x.double().mean(0))
    torch.testing.assert_close(parts.covariance, torch.from_numpy(np.cov(x.double().numpy().T)))
    torch.testing.assert_close(parts.covariance, whole.covariance)


def test_frechet_distance_is_the_textbook_formula():
    a = torch.randn(200, 5) @ torch.randn(5, 5)
    b = torch.randn(300, 5) @ torch.randn(5, 5) + 1
    x, y = _statistics(a), _statistics(b)
    root = scipy.linalg.sqrtm(x.covariance.numpy() @ y.covariance.numpy()).real
    trace = np.trace(x.covariance.numpy() + y.covariance.numpy() - 2 * root)
    want = float((x.mean - y.mean).square().sum()) + trace
    assert metrics.frechet_distance(x, y) == pytest.approx(want, rel=1e-9)
    assert metrics.frechet_distance(y, x) == pytest.approx(want, rel=1e-9)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_with_fewer_images_than_features_is_finite_and_not_negative():
    a, b = torch.randn(5, 40), torch.randn(7, 40)
    x, y = _statistics(a), _statistics(b)
    assert 0 < metrics.frechet_distance(x, y) < 1000
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)


def test_frechet_is_called_fid_for_inception_alone_and_states_its_protocol():
    a, b = _images(batch=4)
    features = lambda x: x.mean((2, 3))  # noqa: E731  the smallest extractor there is
    result = metrics.frechet([a[:3], a[3:]], [b], features, "means")
    assert result.name == "fd_means" and (result.n_real, result.n_fake, result.dim) == (4, 4, 3)
    assert "4 real and 4 fake images, 3 features" in result.protocol
    assert "biased" not in result.protocol
    few = metrics.frechet([a[:2]], [b[:2]], features, "means")
    assert "biased upwards" in few.protocol
    assert metrics.frechet([a], [b], features, "inception").name == "fid"
    with pytest.raises(ValueError, match="got 0"):
        metrics.frechet([], [b], features, "means")
    with pytest.raises(ValueError, match="at least 2"):
        metrics.frechet([a[:1]], [b], features, "means")


def test_trunk_features_are_one_vector_per_image_that_tells_images_apart():
    network = LPIPS(net="squeeze")
    a, b = _images(batch=2, height=40, width=40)
    features = metrics.trunk_features(network)
    with torch.no_grad():
        x, y = features(a), features(b)
    assert x.shape == (2, 512) and not torch.allclose(x, y, rtol=1e-3)


def test_inception_needs_a_local_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no Inception weights"):
        metrics.inception_features(tmp_path / "none.pth")


def test_inception_without_the_extra_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    (tmp_path / "w.pth").write_bytes(b"x")
    with pytest.raises(ImportError, match=r'pip install "vqfast\[eval\]"'):
        metrics.inception_features(tmp_path / "w.pth")
