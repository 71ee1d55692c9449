"""Stubs of the packages whose names are loaded on first use, for type checkers and editors.

    python -m vqfast.testing.stubs      writes them again: a public name or an op is new

A checker cannot follow a module's `__getattr__`, and takes `vqfast.ops.nearest` for the module of
that name. A stub holds one import per name and no type of its own, so that signatures stand in one
place; tests compare the files with what this module would write.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import vqfast
from vqfast import nn, ops

_HEAD = "# Written by `python -m vqfast.testing.stubs`.\n"


def _imports(home: dict[str, str]) -> list[str]:
    """The lines that import names, given the module of each, in the order that ruff wants."""
    return [f"from {home[name]} import {name} as {name}" for name in sorted(home, key=_place(home))]


def _place(home: dict[str, str]) -> Callable[[str], tuple[str, bool, str]]:
    return lambda name: (home[name], name.islower(), name)


def stubs() -> dict[Path, str]:
    """What each stub should hold, by its path."""
    root = Path(vqfast.__file__).parent
    modules = [f"from vqfast import {name} as {name}" for name in vars(vqfast)["_MODULES"]]
    functions = {name: f"vqfast.ops.{name}" for name in ops.load_all()}
    lines = {
        "__init__.pyi": [*modules, *_imports(vars(vqfast)["_HOME"]), "", "__version__: str"],
        "nn/__init__.pyi": _imports(vars(nn)["_WHERE"]),
        "ops/__init__.pyi": [
            "from types import ModuleType",
            "",
            *_imports(functions),
            "",
            "def load_all() -> dict[str, ModuleType]: ...",
        ],
    }
    return {root / path: _HEAD + "\n".join(text) + "\n" for path, text in lines.items()}


if __name__ == "__main__":
    for path, text in stubs().items():
        path.write_text(text, encoding="utf-8")
