"""The stubs of vqfast, vqfast.nn and vqfast.ops name what these packages have."""

from pathlib import Path

import pytest

import vqfast
from vqfast.testing.stubs import stubs


@pytest.mark.parametrize("path", stubs(), ids=lambda path: path.parent.name)
def test_a_stub_is_what_would_be_written(path):
    again = "run `python -m vqfast.testing.stubs`"
    assert path.read_text(encoding="utf-8") == stubs()[path], again


def test_the_package_says_that_it_is_typed():
    assert (Path(vqfast.__file__).parent / "py.typed").exists()
