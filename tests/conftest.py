"""Fixtures that every test file may use: seeds, backends, instruction sets."""

import importlib
import os
import sys

if "PYTEST_XDIST_WORKER" in os.environ:  # several of them share the cores; read as torch is loaded
    _each = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _each)))

import numpy as np
import pytest
import torch

import vqfast
from vqfast import _dispatch, _native, cli, images
from vqfast.models import conditioning


@pytest.fixture(scope="session", autouse=True)
def _autograd_starts_first():
    """Where the first backward pass of a process comes after an opcheck, autograd starts threads,
    and a forked child (test_train_ddp.py) can then not go backward.
    """
    torch.ones(1, requires_grad=True).sum().backward()


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def poison(monkeypatch):
    """Unwritten buffers hold NaN for the length of the test."""
    monkeypatch.setenv("VQFAST_POISON", "1")


@pytest.fixture(params=["cpu", "reference"])
def each_backend(request):
    """The native and the reference backend in turn, forced."""
    if request.param == "cpu" and _native.load() is None:
        pytest.skip("native library not built")
    with _dispatch.backend(request.param):
        yield request.param


@pytest.fixture(params=_native.ISAS)
def each_isa(request):
    """Every instruction set that this CPU has, in turn, with the native backend forced."""
    library = _native.load()
    if library is None:
        pytest.skip("native library not built")
    if request.param not in library.supported():
        pytest.skip(f"this CPU lacks {request.param}")
    before = library.selected()
    library.select(request.param)
    try:
        with _dispatch.backend("cpu"):
            yield request.param
    finally:
        library.select(before)


@pytest.fixture(params=[1, 2])
def each_thread_count(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def shared_data():
    """The folder of development data beside the checkout; skips where it is absent."""
    folder = os.path.join(os.path.dirname(__file__), "..", "..", "shared", "data")
    if not os.path.isdir(folder):
        pytest.skip("../shared/data is absent")
    return os.path.abspath(folder)


@pytest.fixture(scope="session")
def foreign():
    """foreign(module, name): what another library defines; skips where that is not installed."""
    root = os.path.realpath(os.path.join(os.path.dirname(__file__), ".."))

    def find(module, name):
        path = sys.path[:]
        # `python -m pytest` puts the root here; diffusers would take its kernels/ for a package
        sys.path[:] = [p for p in path if os.path.realpath(p) != root]
        try:
            pytest.importorskip(module.partition(".")[0])
            return getattr(importlib.import_module(module), name)
        finally:
            sys.path[:] = path

    return find


# ---- the command line on small random models


@pytest.fixture
def run_cli(capfd, tmp_path, monkeypatch):
    """run_cli(*arguments) -> (exit code, stdout, stderr), in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        capfd.readouterr()
        code = cli.main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory):
    """Folder of a random tokenizer: 2 pixels per code, 16 codes, resolution 16."""
    torch.manual_seed(1)
    config = vqfast.VQGANConfig(
        ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), resolution=16, z_channels=8,
        n_embed=16, embed_dim=4,
    )  # fmt: skip
    model = vqfast.VQGAN(config)
    with torch.no_grad():
        model.quantize.embedding.weight.normal_()
    folder = tmp_path_factory.mktemp("models") / "tokenizer"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory, tiny_tokenizer):
    """Folder of a random class-conditional pipeline: 16 x 16 images, classes ant, bee, cat."""
    torch.manual_seed(2)
    first = vqfast.VQGAN.from_pretrained(tiny_tokenizer)
    gpt = vqfast.GPT(vqfast.GPTConfig(16, 64, n_layer=1, n_head=2, n_embd=16))
    with torch.no_grad():
        for p in gpt.parameters():
            p.normal_(0, 0.3)
    classes = {"kind": "class", "n_classes": 3, "class_names": ["ant", "bee", "cat"]}
    folder = tmp_path_factory.mktemp("models") / "pipeline"
    condition = conditioning.build(classes, first)
    vqfast.Pipeline(first, gpt, condition).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def two_pictures(tmp_path_factory):
    """Two smooth 20 x 28 PNGs, alone in their folder."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = []
    for i in range(2):
        small = images.array_to_image(rng.integers(0, 255, (5, 7, 3), dtype=np.uint8))
        paths.append(folder / f"{i}.png")
        images.save_png(images.resize_center_crop(small, (20, 28)), paths[-1])
    return paths
