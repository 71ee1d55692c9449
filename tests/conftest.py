"""Fixtures that every test file may use: seeds, backends, instruction sets."""

import os

import pytest
import torch

from vqfast import _dispatch, _native


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
