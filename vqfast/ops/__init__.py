"""The functional layer: one file per op, named as its public function.

Importing this package imports every file in it, so that all schemas exist before anything is
traced. A function and its module share a name: `vqfast.ops.nearest` is the function;
`importlib.import_module("vqfast.ops.nearest")` the module. This package's own files take a function
from its module: where files import one another, mypy takes `vqfast.ops.nearest` for the module.
"""

import importlib
import pkgutil
from types import ModuleType

_modules: dict[str, ModuleType] = {}


def load_all() -> dict[str, ModuleType]:
    """Op modules by name. Each holds its public function, its Op objects, `sample_inputs` and
    `COST`."""
    if not _modules:
        for entry in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
            if not entry.name.startswith("_"):  # what belongs to one op, beside its file
                _modules[entry.name] = importlib.import_module(f"{__name__}.{entry.name}")
        for name, module in _modules.items():
            globals()[name] = getattr(module, name)
    return _modules


load_all()
