"""The machine code of the native library: each instruction set keeps to itself, no flag leaks into
the process."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vqfast import _native

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {  # registers that code of an instruction set must not name
    "base": r"%[yz]mm",
    "avx2": r"%zmm",
}


@pytest.fixture(scope="module")
def functions():
    """{symbol: disassembly} of the native library."""
    if _native.load() is None:
        pytest.skip("native library not built")
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    if "avx2" not in _native.ISAS or _native.load().supported()[-1:] != ["base"]:
        pytest.skip("not an x86-64 build")
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", "-C", _native.load().__file__],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found = {}
    for block in text.split("\n\n"):
        head = re.match(r"\s*[0-9a-f]+ <(.+)>:\n", block)
        if head:
            found[head.group(1)] = block
    return found


@pytest.mark.parametrize("isa", FORBIDDEN)
def test_an_instruction_set_uses_only_its_registers(functions, isa):
    mine = {name: code for name, code in functions.items() if f"vqfast::{isa}::" in name}
    assert mine, f"no function of {isa} was found"
    wrong = [name for name, code in mine.items() if re.search(FORBIDDEN[isa], code)]
    assert not wrong, wrong[:5]


def test_avx512_code_is_there_and_uses_its_registers(functions):
    mine = [code for name, code in functions.items() if "vqfast::avx512::" in name]
    assert any("%zmm" in code for code in mine)


def test_code_that_runs_on_any_cpu_is_plain(functions):
    """Static initialisers and the bindings run before an instruction set is chosen."""
    plain = {
        name: code
        for name, code in functions.items()
        if name.startswith(("_GLOBAL__sub_I", "vqfast::RegisterKernel", "PyInit"))
        or "static_initialization" in name
    }
    assert plain
    wrong = [name for name, code in plain.items() if re.search(r"%[yz]mm", code)]
    assert not wrong, wrong[:5]


def test_no_flag_that_changes_the_whole_process_or_ties_to_this_cpu():
    for path in (ROOT / "CMakeLists.txt", ROOT / "setup.py"):
        text = re.sub(r"#.*", "", path.read_text())
        assert not re.search(r"-ffast-math|-Ofast|-march=native|-funsafe-math", text), path.name
