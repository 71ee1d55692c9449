"""What a new process sees: quick imports, no side effects, clear words where the native library is
missing."""

import json
import os
import subprocess
import sys

import pytest

from vqfast import _native

NATIVE = _native.missing() is None


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("VQFAST_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**kept, **env},
    )


def answer(code: str, **env: str):
    done = run(code, **env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_import_loads_neither_torch_nor_triton_nor_pillow():
    loaded = answer(
        "import json, sys, vqfast; print(json.dumps([m for m in"
        " ('torch', 'triton', 'PIL', 'numpy', 'omegaconf', 'torchvision') if m in sys.modules]))"
    )
    assert loaded == []


def test_ops_on_the_cpu_load_no_triton():
    loaded = answer(
        "import json, sys, torch, vqfast; vqfast.nearest(torch.randn(5, 3), torch.randn(4, 3));"
        "print(json.dumps([m for m in ('triton', 'torchvision') if m in sys.modules]))"
    )
    assert loaded == []


def test_sampling_loads_neither_triton_nor_what_reads_yaml_runs():
    loaded = answer("""
import json, os, sys, tempfile, vqfast.cli
sheet = os.path.join(tempfile.mkdtemp(), "a.png")
assert vqfast.cli.main(["sample", "-n", "1", "--device", "cpu", "--grid", sheet]) == 0
assert os.path.getsize(sheet)
print(json.dumps([m for m in ('triton', 'torchvision', 'omegaconf', 'torch._dynamo',
                              'torch._inductor', 'scipy', 'tensorboard') if m in sys.modules]))
""")
    assert loaded == []


def test_the_program_spares_the_collector_and_a_call_does_not():
    found = answer("""
import gc, json, sys, vqfast.cli
found = []
for arguments in (["info", "--json"], None):
    sys.argv = ["vqfast", "info", "--json"]
    assert vqfast.cli.main(arguments) == 0
    found += [gc.get_freeze_count() > 0, gc.isenabled()]
print(json.dumps(found))
""")
    assert found == [False, True, True, True]


def test_import_and_first_call_leave_the_process_as_it_was():
    same = answer("""
import json, locale, random, signal, torch
def state():
    return [torch.get_rng_state().tolist(), random.getstate(), str(torch.get_default_dtype()),
            torch.get_num_threads(), locale.setlocale(locale.LC_ALL),
            [str(signal.getsignal(s)) for s in (2, 11, 15)],
            (torch.full((64,), 1e-39) *
            1).tolist(), 5e-324 * 1]
before = state()
import vqfast
q = vqfast.quantize(torch.ones(40, 8), torch.zeros(9, 8))
print(json.dumps(state() == before))
""")
    assert same is True


MISSING = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "vqfast._C":
            raise ImportError("blocked by a test")
sys.meta_path.insert(0, Block())
"""


def test_without_the_native_library_the_reference_answers_with_one_warning():
    done = run(
        MISSING
        + """
import json, torch, vqfast
z, c = torch.randn(50, 6), torch.randn(20, 6)
right = torch.cdist(z.double(), c.double()).argmin(1)
print(json.dumps([torch.equal(vqfast.nearest(z, c), right) for _ in range(3)]))
"""
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True] * 3
    assert done.stderr.count("pure torch reference") == 1


def test_without_the_native_library_info_says_why():
    report = answer(MISSING + "import json, vqfast; print(json.dumps(vqfast.info()))")
    assert report["native"]["cpu"] != "built"
    assert report["ops"]["cpu"]["nearest"]["takes"] == "reference"


@pytest.mark.skipif(not NATIVE, reason="native library not built")
def test_each_isa_can_be_forced_and_an_unknown_one_is_refused():
    code = (
        "import json, torch, vqfast; vqfast.nearest(torch.ones(2, 3), torch.ones(2, 3));"
        "print(json.dumps(vqfast.info()['cpu']['isa']))"
    )
    for isa in _native.load().supported():
        assert answer(code, VQFAST_CPU_ISA=isa) == isa
    refused = run(code, VQFAST_CPU_ISA="sse9")
    assert refused.returncode == 1 and "sse9" in refused.stderr


def test_forced_backend_by_environment_never_falls_back():
    done = run(
        "import torch, vqfast; vqfast.nearest(torch.ones(2, 3), torch.ones(2, 3))",
        VQFAST_BACKEND="cuda",
    )
    assert done.returncode == 1 and "BackendError" in done.stderr


def test_kernels_work_in_a_forked_child():
    right = answer("""
import json, os, torch, vqfast
z, c = torch.randn(2000, 8), torch.randn(600, 8)
expected = vqfast.nearest(z, c)
read, write = os.pipe()
pid = os.fork()
if pid == 0:
    torch.set_num_threads(1)
    os.write(write, b"1" if torch.equal(vqfast.nearest(z, c), expected) else b"0")
    os._exit(0)
os.waitpid(pid, 0)
print(json.dumps(os.read(read, 1) == b"1"))
""")
    assert right is True


def test_kernels_folder_refuses_to_be_a_top_level_package():
    root = os.path.join(os.path.dirname(__file__), "..")
    done = run(f"import sys; sys.path.insert(0, {root!r}); import kernels")
    assert done.returncode == 1 and "vqfast.kernels" in done.stderr


@pytest.mark.skipif(not NATIVE, reason="native library not built")
def test_one_copy_of_openmp_is_mapped():
    maps = answer("""
import json, torch, vqfast
torch.set_num_threads(2)
vqfast.nearest(torch.randn(5000, 8), torch.randn(600, 8))
lines = [x.split()[-1] for x in open("/proc/self/maps") if "gomp" in x.split()[-1]]
print(json.dumps(sorted(set(lines))))
""")
    assert len(maps) <= 1, maps
