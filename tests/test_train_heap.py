"""Memory that a training process frees stays its own."""

import json
import platform
import subprocess
import sys

import pytest

CHILD = """
import json, resource, torch
from vqfast.train.heap import keep_freed_memory
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    before = faults()
    torch.ones(10 << 20)
    return faults() - before
if {keeps}:
    keep_freed_memory()
print(json.dumps(min(step() for _ in range(100))))
"""


def _takes_large_thresholds() -> bool:
    name, version = platform.libc_ver()
    return name == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not _takes_large_thresholds(),
    reason="an allocator that takes a threshold above 32 MiB: glibc from 2.35 on",
)
def test_a_later_step_takes_the_memory_of_the_first():
    def faults(keeps):
        code = CHILD.format(keeps=keeps)
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout)

    # 40 MiB lie above every threshold that glibc finds by itself: without ours each step maps, and
    # Linux clears, 10,240 pages of 4 KiB. With ours the first steps may do so too: before 2.38 an
    # aligned block fits the gap of its like only once gaps have grown together
    assert 4 * faults(True) < faults(False)
