"""Opponents, one per file, found by file name: nobody edits a list to add one.

An opponent file has
    MEASURES            the measures that it takes part in: names of ops, or of networks.py
    version()           the version of what it runs; raises ImportError when that is not installed
    make(measure, case, inputs) -> function of no arguments that does the work once
and may raise `Unsuitable` in `make` for a case that it cannot do. `inputs` are those of our own
runner: the raw op's tensors and scalars, or what networks.py says. Preparation that a user would do
once (an index that is built, norms of a frozen codebook) belongs into `make`, outside the clock. A
function may carry a `note` for the table, such as another precision than that of the row.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Any


class Unsuitable(Exception):
    """The opponent cannot do this case; the text says why."""


def opponents(measure: str) -> tuple[dict[str, ModuleType], dict[str, str]]:
    """Those that take part in a measure: the present ones by name, and why the others are
    absent.
    """
    present, absent = {}, {}
    for entry in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        module = importlib.import_module(f"{__name__}.{entry.name}")
        if measure not in module.MEASURES:
            continue
        try:
            module.version()
        except ImportError as error:
            absent[entry.name] = str(error).splitlines()[0]
        else:
            present[entry.name] = module
    return present, absent


def runners(measure: str, case: Any, inputs: tuple) -> tuple[dict[str, Any], dict[str, str]]:
    """name -> prepared function, and name -> reason for each opponent that is missing here."""
    present, missing = opponents(measure)
    ready = {}
    for name, module in present.items():
        try:
            ready[name] = module.make(measure, case, inputs)
        except Unsuitable as error:
            missing[name] = str(error)
    return ready, missing
