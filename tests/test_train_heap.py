"""Memory that a training process frees stays its own."""

import json
import subprocess
import sys

import pytest

CHILD = """
import json, resource, torch
from vqfast.train.heap import keep_freed_memory
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    blocks = [torch.ones(1 << 20) for _ in range(16)]
if {keeps}:
    keep_freed_memory()
step(), step()
before = faults()
step()
print(json.dumps(faults() - before))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="an allocator of Linux")
def test_a_second_step_takes_the_memory_of_the_first():
    def faults(keeps):
        code = CHILD.format(keeps=keeps)
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout)

    # 16 blocks of 1,024 pages
    assert faults(True) < 1024 < faults(False)
