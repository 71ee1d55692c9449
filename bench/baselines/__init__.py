"""Opponents, one per file, found by file name: nobody edits a list to add one. Files whose name
begins with _ hold what several share.

An opponent file has
    MEASURES            the measures that it takes part in: names of ops, or of networks.py and
        sampling.py
    version()           the version of what it runs; raises ImportError when that is not installed
    make(measure, case, inputs) -> function of no arguments that does the work once; for `generate`
        a function of the number of tokens to draw, whose inputs are (vqfast.GPT, cond [B, 1])
    DEVICES                 where it runs, ("cpu", "cuda") if it does not say; on another device its
        `version` is never called, so that what only a GPU needs is not imported without one
    FORMATS                 measure -> formats, if it has a row in some only
and may raise `Unsuitable` in `make` for a case that it cannot do. `inputs` are those of our own
runner: the raw op's tensors and scalars, or what networks.py says. Preparation that a user would do
once (an index that is built, norms of a frozen codebook) belongs into `make`, outside the clock. A
function may carry a `note` for the table, such as another precision than that of the row, and of
`train_tokenizer` `looks_again`, if its discriminator sees images of the updated autoencoder.
"""

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple


class Unsuitable(Exception):
    """The opponent cannot do this case; the text says why."""


class Told(NamedTuple):
    """What an opponent is told of a network's case besides its inputs."""

    id: str
    dtype: str
    device: str


def files() -> list[str]:
    """Names of all opponents."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def available(module: ModuleType, device: str) -> str | None:
    """Why an opponent cannot run on a device; None when it can."""
    kind = device.partition(":")[0]
    devices = getattr(module, "DEVICES", ("cpu", "cuda"))
    if kind not in devices:
        return f"needs {' or '.join(devices)}"
    try:
        module.version()
    except ImportError as error:
        return str(error).splitlines()[0]
    return None


def formats(module: ModuleType, measure: str) -> tuple[str, ...]:
    """The dtypes in which an opponent has rows of a measure."""
    return getattr(module, "FORMATS", {}).get(measure, ("fp32", "bf16", "fp16"))


def opponents(measure: str, device: str) -> tuple[dict[str, ModuleType], dict[str, str]]:
    """Those that take part in a measure: the present ones by name, and why the others are
    absent.
    """
    present, absent = {}, {}
    for name in files():
        module = _module(name)
        if measure in module.MEASURES:
            why = available(module, device)
            if why is None:
                present[name] = module
            else:
                absent[name] = why
    return present, absent


def runner(name: str, measure: str, case: Any, inputs: tuple) -> Callable[[], Any]:
    """One opponent, prepared. Unsuitable when it cannot do the case."""
    return _module(name).make(measure, case, inputs)


def runners(
    measure: str,
    case: Any,
    inputs: tuple,
    device: str,
    *,
    chosen: Callable[[ModuleType], bool] = lambda module: True,
    once: Callable[[Callable], Any] = lambda run: run(),
) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """name -> prepared function that has run once, and name -> reason for each opponent that is
    missing here. `chosen` leaves the others out, `once` says how a function is run.
    """
    present, missing = opponents(measure, device)
    ready = {}
    for name in [name for name, module in present.items() if chosen(module)]:
        try:
            run = runner(name, measure, case, inputs)
            once(run)
        except Unsuitable as error:
            missing[name] = str(error)
        except Exception as error:  # another project's code may fail in any way: its row is missing
            missing[name] = f"fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        else:
            ready[name] = run
    return ready, missing
