"""The perceptual distance: its value, its gradient at hard places, and its two files."""

import hashlib

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

from vqfast import CheckpointError
from vqfast.models import lpips
from vqfast.models.lpips import LPIPS, NETS

SMALLEST = {"vgg": 16, "alex": 31, "squeeze": 17}
TAPS = {"vgg": 5, "alex": 5, "squeeze": 7}


def pair(side=40, B=2, channels=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.rand(B, channels, side, side, generator=g) * 2 - 1 for _ in range(2)]


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(lpips.importlib.util, "find_spec", lambda name: None)
    return tmp_path / "hub" / "checkpoints"


def trunk_state(net):
    """A random trunk under torchvision's names, with the classifier that real files have."""
    own = LPIPS(net=net, heads="none").net.state_dict()  # slice3.10.weight is features.10.weight
    state = {f"features.{k.split('.', 1)[1]}": v + 0.01 for k, v in own.items()}
    return state | {"classifier.1.weight": torch.zeros(2, 2)}


def heads_state(net):
    return {k: v + 0.5 for k, v in LPIPS(net=net).state_dict().items() if k.startswith("lin")}


# ---- the value


def test_vgg_distance_is_the_published_formula():
    x, y = (t.double() for t in pair(32))
    model = LPIPS().double()
    sd = model.state_dict()
    shift = torch.tensor([-0.030, -0.088, -0.188]).double()[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450]).double()[:, None, None]
    blocks = [[0, 2], [5, 7], [10, 12, 14], [17, 19, 21], [24, 26, 28]]
    a, b, want = (x - shift) / scale, (y - shift) / scale, 0
    for k, convs in enumerate(blocks):
        if k:
            a, b = F.max_pool2d(a, 2), F.max_pool2d(b, 2)
        for i in convs:
            name = f"net.slice{k + 1}.{i}"
            a, b = (
                F.relu(F.conv2d(t, sd[f"{name}.weight"], sd[f"{name}.bias"], padding=1))
                for t in (a, b)
            )
        u, v = (t / (t.square().sum(1, keepdim=True).sqrt() + 1e-10) for t in (a, b))
        want = want + F.conv2d((u - v) ** 2, sd[f"lin{k}.model.1.weight"]).mean(
            (2, 3), keepdim=True
        )
    # shift and scale are float32 buffers
    torch.testing.assert_close(model(x, y), want, rtol=1e-6, atol=0)
    assert want.shape == (2, 1, 1, 1)


@pytest.mark.parametrize("net", NETS)
def test_without_heads_layers_are_summed_equally(net):
    x, y = pair()
    bare, ones = LPIPS(net=net, heads="none"), LPIPS(net=net)
    assert not bare.has_heads and not any(k.startswith("lin") for k in bare.state_dict())
    for k in range(TAPS[net]):
        getattr(ones, f"lin{k}").model[1].weight.fill_(1)
    torch.testing.assert_close(bare(x, y), ones(x, y))


@pytest.mark.parametrize("net", NETS)
def test_matches_the_lpips_package_on_a_shared_random_trunk(net):
    package = pytest.importorskip("lpips")
    theirs = package.LPIPS(net=net, pnet_rand=True, verbose=False)
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("lins.")}
    ours = LPIPS(net=net)
    ours.load_state_dict(state)
    x, y = pair(64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, y), theirs.eval()(x, y), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("net", NETS)
def test_distance_is_zero_for_equal_images_and_symmetric(net):
    x, y = pair()
    model = LPIPS(net=net)
    assert not model(x, x).any() and (model(x, y) > 0).all()
    assert torch.equal(model(x, y), model(y, x))


def test_one_channel_is_shown_as_grey():
    x, y = pair(channels=1)
    model = LPIPS(net="squeeze")
    torch.testing.assert_close(model(x, y), model(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize("net", NETS)
def test_smallest_side_is_exact(net):
    side, model = SMALLEST[net], LPIPS(net=net)
    assert model(*pair(side)).isfinite().all()
    with pytest.raises(ValueError, match=f"at least {side}"):
        model(*pair(side - 1))
    with pytest.raises(RuntimeError):  # the trunk itself cannot go lower
        list(model.net(pair(side - 1)[0]))


# ---- training


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-20, 1e-10, 1e-4])
def test_unit_vectors_have_a_finite_gradient_near_zero(dtype, scale):
    f = (scale * torch.ones(1, 4, 1, 2)).to(dtype).requires_grad_()
    lpips._unit(f).square().sum().backward()
    assert f.grad.isfinite().all()


@pytest.mark.parametrize("level", [0.0, -1.0, -0.03])
def test_gradient_is_finite_on_flat_and_on_equal_images(level):
    model = LPIPS(net="squeeze")
    x = torch.full((1, 3, 32, 32), level)
    for y in (x.clone(), pair(32, 1)[0]):
        y.requires_grad_()
        model(x, y).sum().backward()
        assert y.grad.isfinite().all()


def test_gradient_is_finite_when_all_features_die():
    model = LPIPS(net="squeeze")
    model.net.slice1[0].bias.fill_(-1e6)  # nothing passes the first ReLU
    x, y = pair(32)
    y.requires_grad_()
    out = model(x, y)
    out.sum().backward()
    assert out.isfinite().all() and y.grad.isfinite().all()


def test_stays_in_eval_mode_and_frozen_inside_a_training_model():
    parent = nn.ModuleList([LPIPS(), nn.Dropout()])
    parent.train()
    assert parent[1].training and not any(m.training for m in parent[0].modules())
    assert not any(p.requires_grad for p in parent.parameters())
    x, y = pair()
    assert torch.equal(parent[0](x, y), parent[0](x, y))


def test_random_weights_are_the_same_everywhere_and_draw_nothing():
    rng = torch.get_rng_state()
    a = LPIPS()
    assert torch.equal(torch.get_rng_state(), rng)
    torch.manual_seed(99)
    b = LPIPS("random")
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert (a.lin0.model[1].weight >= 0).all()


def test_autocast_gives_float32_distances():
    x, y = pair(32)
    model = LPIPS(net="squeeze")
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x, y)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, model(x, y), rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("x", "y", "error", "words"),
    [
        (torch.zeros(1, 3, 32, 32), torch.zeros(2, 3, 32, 32), ValueError, r"\[2, 3, 32, 32\]"),
        (torch.zeros(1, 4, 32, 32), torch.zeros(1, 4, 32, 32), ValueError, r"\[1, 4, 32, 32\]"),
        (torch.zeros(3, 32, 32), torch.zeros(3, 32, 32), ValueError, "4 dimensions"),
        (torch.zeros(1, 3, 32, 32).long(), torch.zeros(1, 3, 32, 32), TypeError, "int64"),
    ],
)
def test_images_are_checked(x, y, error, words):
    with pytest.raises(error, match=words):
        LPIPS(net="squeeze")(x, y)


# ---- files


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_are_loaded_and_used(tmp_path, net, suffix):
    trunk, heads = trunk_state(net), heads_state(net)
    write = save_file if suffix == ".safetensors" else torch.save
    write(trunk, str(tmp_path / f"trunk{suffix}"))
    write(heads, str(tmp_path / f"heads{suffix}"))
    model = LPIPS(tmp_path / f"trunk{suffix}", net=net, heads=tmp_path / f"heads{suffix}")
    random = LPIPS(net=net).state_dict()
    for key, value in model.state_dict().items():
        if not key.startswith("scaling"):
            assert not torch.equal(value, random[key]), key
    assert model.is_lpips and model.name == f"lpips_{net}"
    assert LPIPS(tmp_path / f"trunk{suffix}", net=net).name == f"{net}_dist"


def test_missing_trunk_is_named_with_its_place(empty_cache, tmp_path):
    for weights in ("auto", tmp_path / "gone.pth"):
        with pytest.raises(CheckpointError) as e:
            LPIPS(weights)
        assert "vgg16-397923af.pth" in str(e.value) and str(empty_cache) in str(e.value)
        assert "trunk" in str(e.value)


def test_missing_heads_are_named_with_their_place(empty_cache, tmp_path):
    torch.save(trunk_state("squeeze"), tmp_path / "t.pth")
    for heads in ("auto", tmp_path / "gone.pth"):
        with pytest.raises(CheckpointError) as e:
            LPIPS(tmp_path / "t.pth", net="squeeze", heads=heads)
        assert "heads" in str(e.value) and "lpips" in str(e.value)
        assert str(empty_cache) in str(e.value)


def test_auto_finds_files_in_the_cache(empty_cache):
    empty_cache.mkdir(parents=True)
    torch.save(trunk_state("alex"), empty_cache / "alexnet-owt-7be5be79.pth")
    torch.save(heads_state("alex"), empty_cache / "alex.pth")
    assert LPIPS("auto", net="alex", heads="auto").is_lpips


def test_the_two_files_are_told_apart(tmp_path):
    torch.save(trunk_state("squeeze"), tmp_path / "trunk.pth")
    torch.save(heads_state("squeeze"), tmp_path / "heads.pth")
    with pytest.raises(CheckpointError, match="these are the heads; the trunk is missing"):
        LPIPS(tmp_path / "heads.pth", net="squeeze")
    with pytest.raises(CheckpointError, match="this is the trunk; the heads are missing"):
        LPIPS(tmp_path / "trunk.pth", net="squeeze", heads=tmp_path / "trunk.pth")


@pytest.mark.parametrize("damage", ["missing", "shape", "nan", "names"])
def test_a_file_that_does_not_fit_lists_its_keys(tmp_path, damage):
    state = heads_state("squeeze")
    key = "lin3.model.1.weight"
    if damage == "missing":
        del state[key]
    elif damage == "shape":
        state[key] = torch.ones(1, 7, 1, 1)
    elif damage == "nan":
        state[key][0, 0] = torch.nan
    else:  # the other common spelling: no random heads instead
        state = {k.replace("lin", "lins."): v for k, v in state.items()}
    torch.save(trunk_state("squeeze"), tmp_path / "t.pth")
    torch.save(state, tmp_path / "h.pth")
    with pytest.raises(CheckpointError, match=key):
        LPIPS(tmp_path / "t.pth", net="squeeze", heads=tmp_path / "h.pth")


def test_a_file_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"features.0.weight": Evil()}, tmp_path / "t.pth")
    with pytest.raises(CheckpointError, match="print"):
        LPIPS(tmp_path / "t.pth")


def test_real_squeezenet_trunk_ranks_distortions(shared_data):
    path = f"{shared_data}/weights/squeezenet1_1_tvformat_fp32.safetensors"
    model = LPIPS(path, net="squeeze")
    assert model.name == "squeeze_dist"
    data = pytest.importorskip("skimage.data")
    photo = torch.tensor(data.astronaut()[:256, 96:352]).movedim(-1, 0)[None] / 127.5 - 1
    blurred = F.interpolate(F.avg_pool2d(photo, 4), scale_factor=4.0)
    other = torch.tensor(data.coffee()[:256, :256]).movedim(-1, 0)[None] / 127.5 - 1
    near, mid, far = (model(photo, y).item() for y in (photo * 0.98, blurred, other))
    assert 0 < near < 0.2 * mid and mid < far


def test_vgg_heads_of_the_lpips_package_are_the_published_ones(tmp_path):
    package = pytest.importorskip("lpips")
    torch.save(trunk_state("vgg"), tmp_path / "t.pth")
    model = LPIPS(tmp_path / "t.pth", heads="auto")
    path = lpips._find_heads("auto", "vgg")
    assert package.__path__[0] in str(path)
    assert hashlib.md5(path.read_bytes()).hexdigest() == "d507d7349b931f0638a25a48a722f98a"
    assert model.lin0.model[1].weight.shape == (1, 64, 1, 1) and model.is_lpips
