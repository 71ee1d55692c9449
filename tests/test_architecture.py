"""The house rules, read from the text of the files: layers, registration by name, one place each.
Nothing is imported."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vqfast"

LEVELS = {
    "_dispatch": 0, "_native": 0, "_check": 0, "_files": 0, "errors": 0,
    "ops": 1, "config": 1,
    "nn": 2, "checkpoints": 2, "images": 2, "windows": 2,
    "models": 3,
    "engine": 4, "data": 4, "metrics": 4, "losses": 4, "accelerate": 4, "testing": 4,
    "pipeline": 5, "sampling": 5, "train": 5, "_info": 5,
    "": 6, "cli": 6, "__main__": 7,
}  # fmt: skip
PROBES = {"simd_exp", "simd_round", "nearest_prepare"}  # no op calls them: tests and benches do
LINES = {"kernels": 500, "vqfast/ops": 250, "csrc": 600}
DEFAULT_LINES = 450
TOP_LEVEL = {
    "vqfast", "csrc", "kernels", "bench", "tests", "configs", "docs", "setup.py", "CMakeLists.txt",
    "pyproject.toml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "Makefile",
}  # fmt: skip


def _tracked() -> list[Path]:
    """Files of the project: what git tracks, or everything where there is no git."""
    try:
        out = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / line for line in out.stdout.splitlines() if (ROOT / line).exists()]


def _python(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def _module(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def _imports(path: Path) -> set[str]:
    """First names below vqfast that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{a.name}" for a in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "vqfast":
                found.add(parts[1] if len(parts) > 1 else "")
    return found


def test_imports_point_down():
    wrong = []
    for path in _python(PACKAGE):
        me = _module(path)
        if me == "" or me not in LEVELS:
            continue
        for other in _imports(path) - {me}:
            if other in LEVELS and other != "":
                up = LEVELS[other] > LEVELS[me]
                beside = LEVELS[other] == LEVELS[me] not in (0, 4, 5)
                if up or (beside and (me, other) != ("_info", "")):
                    wrong.append(f"{path.relative_to(ROOT)} (level {LEVELS[me]}) imports {other}")
    assert not wrong, "\n".join(wrong)


def test_every_module_has_a_level():
    known = {_module(p) for p in _python(PACKAGE)} - set(LEVELS)
    assert not known, f"modules without a level in this test: {sorted(known)}"


def test_kernels_import_nothing_of_vqfast_but_shared_parts_and_their_own():
    """`nearest.py` and what is named after it (`nearest_quantize.py`, `_nearest_launch.py`) may
    import `_nearest_screen.py`; nobody else may."""
    ops = {p.stem for p in _python(ROOT / "kernels")}
    for path in _python(ROOT / "kernels"):
        text = path.read_text()
        words = path.stem.strip("_").split("_")
        owners = {"_".join(words[:n]) for n in range(1, len(words) + 1)} & ops
        own = rf"vqfast\.kernels\._(tuning|lookup|({'|'.join(owners)})_\w+)"
        text = re.sub(r"^from vqfast\.kernels import ", "import vqfast.kernels.", text, flags=re.M)
        for name in re.findall(r"^\s*(?:from|import) (vqfast[\w.]*)", text, re.M):
            assert re.fullmatch(own, name), f"{path.name} imports {name}"


def test_every_kernel_file_has_an_op_of_its_name():
    ops = {p.stem for p in (PACKAGE / "ops").glob("*.py")} - {"__init__"}
    for path in (ROOT / "kernels").glob("[!_]*.py"):
        assert path.stem in ops, f"kernels/{path.name} has no vqfast/ops/{path.name}"
    registered = set()
    for path in (ROOT / "csrc/cpu").glob("*.cpp"):
        registered |= set(re.findall(r"^KERNEL\((\w+),", path.read_text(), re.M))
    for name in registered:
        op = name.removesuffix("_backward")
        assert op in ops or name in PROBES, f"C++ kernel {name} has no op file"


def test_csrc_knows_no_torch_and_pybind11_stands_in_one_file():
    for path in (ROOT / "csrc").rglob("*.*"):
        text = path.read_text()
        assert not re.search(r"#include\s*<(torch|ATen|c10)", text), f"{path.name} includes torch"
        if path.name != "bindings.cpp":
            assert "pybind11" not in text, f"{path.name} mentions pybind11"


@pytest.mark.parametrize(
    ("pattern", "home"),
    [
        (r"^\s*(?:from|import) PIL\b", "vqfast/images.py"),
        (r"\btorch\.load\(", "vqfast/checkpoints/_unpickle.py"),
        (r"^\s*(?:from|import) torchvision\b", None),
        (r"^\s*(?:from|import) (?:taming|diffusers|vector_quantize_pytorch|transformers)\b", None),
    ],
)
def test_one_place_each(pattern, home):
    for path in [*_python(PACKAGE), *_python(ROOT / "kernels")]:
        relative = str(path.relative_to(ROOT))
        if relative != home:
            hit = re.search(pattern, path.read_text(), re.M)
            assert hit is None, (
                f"{relative}: {hit.group().strip()!r} belongs in {home or 'no file'}"
            )


def test_backend_names_are_chosen_in_the_dispatcher_only():
    for path in _python(PACKAGE / "ops"):
        assert not re.search(r"""["'](triton|cuda)["']""", path.read_text()), path.name


def test_three_environment_variables():
    found = set()
    for path in [*_python(PACKAGE), *_python(ROOT / "kernels")]:
        found |= set(re.findall(r"\bVQFAST_[A-Z_]+\b", path.read_text()))
    assert found <= {"VQFAST_BACKEND", "VQFAST_CPU_ISA", "VQFAST_POISON"}, found


def test_top_level_is_the_agreed_one():
    names = {p.relative_to(ROOT).parts[0] for p in _tracked()}
    assert not {n for n in names if not n.startswith(".")} - TOP_LEVEL


def test_files_stay_small_and_names_explain():
    wrong = []
    for path in _tracked():
        if path.suffix not in (".py", ".cpp", ".cu", ".h"):
            continue
        relative = str(path.relative_to(ROOT))
        limit = next((n for k, n in LINES.items() if relative.startswith(k)), DEFAULT_LINES)
        count = len(path.read_text().splitlines())
        if count > limit:
            wrong.append(f"{relative}: {count} lines, limit {limit}")
        if re.fullmatch(r"(utils?|common|helpers?|misc)\.\w+", path.name):
            wrong.append(f"{relative}: the name explains nothing")
    assert not wrong, "\n".join(wrong)


def test_every_cuda_record_is_a_passing_run_of_the_present_file():
    """An op that lets its CUDA kernel into the automatic choice names a ledger line that proves
    it."""
    import hashlib
    import json

    for path in (PACKAGE / "ops").glob("*.py"):
        record = re.search(r"cuda_record=\"([^\"]+)\"", path.read_text())
        if record is None:
            continue
        ledger, _, key = record.group(1).partition("#")
        lines = [json.loads(x) for x in (ROOT / "bench/results" / ledger).read_text().splitlines()]
        line = next(x for x in lines if x.get("id") == key)
        source = (ROOT / "csrc/cuda" / f"{path.stem}.cu").read_bytes()
        assert line["passed"] and line["sha256"] == hashlib.sha256(source).hexdigest(), path.name
