"""setup.py: what is built, what is left out and how that is said; what is in a wheel; what the libraries want from torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from toolchain import find_nvcc, needs_compiler, needs_nvcc

from kdkernels import __version__

ROOT = Path(__file__).parent.parent


def setup(*words: object, expect: int = 0, **environment: str) -> str:
    """Runs setup.py in the checkout; what it printed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KDKERNELS_", "CC", "CXX", "CUDA_", "TORCH_CUDA_"))}
    command = [sys.executable, "setup.py", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**kept, **environment}, check=False)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def build(out: Path, expect: int = 0, native: Path | None = None, **environment: str) -> str:
    """Builds the libraries in `out`, compiling in `native`, a folder of its own where none is given; what setup.py printed."""
    return setup("build_ext", "--build-lib", out, "--build-temp", native or out / "native", expect=expect, **environment)


def wheel(out: Path, **environment: str) -> Path:
    """A wheel in `out`, of the objects that the checkout has already compiled."""
    folders = ["--bdist-dir", out / "bdist", "--dist-dir", out]
    setup("build", "--build-lib", out / "lib", "bdist_wheel", "--skip-build", *folders, **environment)
    (found,) = out.glob("*.whl")
    return found


def info(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "kdkernels" / "_build_info.json").read_text(encoding="utf-8"))


def libraries(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "kdkernels").glob("_C_*"))


def program(file: Path, text: str) -> str:
    file.parent.mkdir(exist_ok=True)
    file.write_text("#!/bin/sh\n" + text)
    file.chmod(0o755)
    return str(file)


#: As a shell script, a compiler that leaves an empty file where it is told to.
COMPILES_NOTHING = 'echo "$@" >> "$0.calls"\nwhile [ $# -gt 1 ] && [ "$1" != -o ]; do shift; done\n[ "$1" != -o ] || : > "$2"\n'


@pytest.fixture(scope="module")
def native_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel(tmp_path_factory.mktemp("native"), KDKERNELS_BUILD="cpu")


def test_none_gives_a_wheel_for_all_systems(tmp_path: Path) -> None:
    made = wheel(tmp_path, KDKERNELS_BUILD="none")
    with zipfile.ZipFile(made) as archive:
        names = archive.namelist()
        said = json.loads(archive.read("kdkernels/_build_info.json"))
    assert made.name == f"kdkernels-{__version__}-py3-none-any.whl"
    assert not any("_C_" in name for name in names)
    for kind in ("cpu", "cuda"):
        assert said[kind] == {"built": False, "reason": "KDKERNELS_BUILD=none", "compiler": "", "flags": []}


def test_an_unknown_value_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    said = build(tmp_path, expect=1, KDKERNELS_BUILD="gpu")
    assert "KDKERNELS_BUILD is one of auto, cpu, cuda, none; got 'gpu'" in said
    assert not list(tmp_path.iterdir())


def test_without_a_compiler_all_is_left_out_with_a_message(tmp_path: Path) -> None:
    reason = "there is no C++ compiler: the one that CXX names is not there"
    said = build(tmp_path, CXX="/nonexistent/c++")
    assert f"left out kdkernels._C_cpu: {reason}" in said or torch.__version__ < (2, 11)
    assert "left out kdkernels._C_cuda: it needs the library for the CPU" in said
    assert libraries(tmp_path) == [] and not info(tmp_path)["cpu"]["built"]
    said = build(tmp_path, expect=1, KDKERNELS_BUILD="cpu", CXX="/nonexistent/c++")
    assert "KDKERNELS_BUILD=cpu, but kdkernels._C_cpu cannot be built: " in said


@needs_compiler
def test_a_compiler_that_fails_does_not_keep_python_s_part_from_being_installed(tmp_path: Path) -> None:
    compiler = program(tmp_path / "c++", "echo '/some/where/x.cpp:1:2: error: bad luck' >&2\nexit 1\n")
    said = build(tmp_path, CXX=compiler)
    assert "the compiler failed. Its last lines:" in said and "  /some/where/x.cpp:1:2: error: bad luck" in said
    assert info(tmp_path)["cpu"]["reason"] == "the compiler failed: x.cpp:1:2: error: bad luck"
    assert libraries(tmp_path) == []
    said = build(tmp_path, expect=1, KDKERNELS_BUILD="cpu", CXX=compiler)
    assert "_C_cpu cannot be built: the compiler failed" in said


@needs_compiler
def test_cuda_asked_for_and_not_there_is_an_error(tmp_path: Path) -> None:
    compiler = program(tmp_path / "c++", COMPILES_NOTHING)
    said = build(tmp_path, expect=1, KDKERNELS_BUILD="cuda", CUDA_HOME=str(tmp_path), CXX=compiler)
    assert "KDKERNELS_BUILD=cuda, but kdkernels._C_cuda cannot be built: there is no nvcc in CUDA_HOME" in said
    said = build(tmp_path, CUDA_HOME=str(tmp_path), CXX=compiler)
    assert "left out kdkernels._C_cuda: there is no nvcc in CUDA_HOME" in said and "built kdkernels._C_cpu" in said
    assert libraries(tmp_path) == ["_C_cpu.abi3.so"]


@needs_compiler
def test_a_toolkit_that_cannot_even_start_is_left_out(tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_bytes(b"no program")
    nvcc.chmod(0o755)
    said = build(tmp_path, CUDA_HOME=str(tmp_path), CXX=program(tmp_path / "c++", COMPILES_NOTHING))
    assert "left out kdkernels._C_cuda: OSError: " in said and libraries(tmp_path) == ["_C_cpu.abi3.so"]


@needs_compiler
@pytest.mark.parametrize(
    ("chosen", "options"),
    [
        ("", ["80,code=sm_80", "90,code=sm_90", "90,code=compute_90"]),
        ("8.0 9.0a", ["80,code=sm_80", "90a,code=sm_90a"]),
        ("Hopper", "TORCH_CUDA_ARCH_LIST holds numbers such as 9.0 or 10.0+PTX; got 'Hopper'"),
        ("10.0", "nvcc does not know 10.0 of TORCH_CUDA_ARCH_LIST"),
    ],
)
def test_nvcc_is_asked_for_the_gpus_that_it_knows_or_that_are_listed(chosen: str, options: list[str] | str, tmp_path: Path) -> None:
    known = "[ $1 != --list-gpu-arch ] || exec printf 'compute_80\\ncompute_90\\n'\n"
    program(tmp_path / "bin" / "nvcc", known + COMPILES_NOTHING)
    environment = {"CUDA_HOME": str(tmp_path), "CXX": program(tmp_path / "c++", COMPILES_NOTHING), "TORCH_CUDA_ARCH_LIST": chosen}
    said = build(tmp_path, **environment)
    calls = tmp_path / "bin" / "nvcc.calls"
    if isinstance(options, str):
        assert f"left out kdkernels._C_cuda: {options}" in said and not calls.exists()
    else:
        assert re.findall(r"-gencode=arch=compute_(\S+)", calls.read_text().splitlines()[0]) == options
        assert libraries(tmp_path) == ["_C_cpu.abi3.so", "_C_cuda.abi3.so"]


@needs_compiler
def test_a_library_that_is_no_longer_built_goes(tmp_path: Path) -> None:
    build(tmp_path, KDKERNELS_BUILD="cpu", CXX=program(tmp_path / "c++", COMPILES_NOTHING))
    before = libraries(tmp_path)
    build(tmp_path, KDKERNELS_BUILD="none")
    assert (before, libraries(tmp_path)) == (["_C_cpu.abi3.so"], [])


@needs_compiler
def test_a_wheel_holds_the_library_and_where_it_is_from(native_wheel: Path) -> None:
    with zipfile.ZipFile(native_wheel) as archive:
        names = archive.namelist()
        said = json.loads(archive.read("kdkernels/_build_info.json"))
        tag = archive.read(f"kdkernels-{__version__}.dist-info/WHEEL").decode()
    assert native_wheel.name.startswith(f"kdkernels-{__version__}-cp310-abi3-") and "Root-Is-Purelib: false" in tag
    assert [name for name in names if "_C_" in name] == ["kdkernels/_C_cpu.abi3.so"]
    assert {"kdkernels/py.typed", "kdkernels/native.py", "kdkernels/benchmarks/cli.py"} <= set(names)
    assert not [name for name in names if "csrc" in name or name.endswith((".cpp", ".cu", ".h", ".inl"))]
    assert (said["version"], said["target"], said["torch"]) == (__version__, "2.11", torch.__version__)
    assert said["cpu"]["built"] and said["cpu"]["reason"] == "" and "-ffp-contract=off" in said["cpu"]["flags"]
    assert re.search(r"\d+\.\d+", said["cpu"]["compiler"])
    assert said["cuda"]["reason"] == "KDKERNELS_BUILD=cpu"
    assert not re.search(r'[" ]/\w', json.dumps(said)), "a folder of this machine"


@needs_compiler
def test_the_wheel_works_away_from_the_checkout(native_wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(native_wheel) as archive:
        archive.extractall(tmp_path)
    code = """
import sys
import torch
import kdkernels
print(kdkernels.__file__)
print(kdkernels.backend_info()["native"])
kdkernels.set_backend("native")
x = torch.arange(24.0).view(1, 2, 3, 4).requires_grad_()
(mean,) = kdkernels.functional.channel_mean([x])
assert torch.equal(mean, torch.tensor([[5.5, 17.5]])), mean
mean.sum().backward()
assert torch.equal(x.grad, torch.full_like(x, 1 / 12)), x.grad
"""
    # Before the checkout, of which an editable install tells Python.
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(tmp_path / "kdkernels") in done.stdout and "'available': True" in done.stdout


def foreign_symbols(library: Path) -> list[str]:
    """What a library wants from others, but from C's and C++'s own."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1] for line in listed.splitlines()]
    own = ("GLIBC", "GCC_", "CXXABI", "__gmon_start__", "_ITM_", "__cxa", "__gxx", "_Unwind")
    return [name for name in names if not any(word in name for word in own)]


def is_stable(name: str) -> bool:
    """A symbol of torch's C shim, which stays the same from version to version."""
    return name.startswith(("aoti_torch_", "torch_"))


@needs_compiler
def test_the_library_wants_nothing_of_torch_but_its_stable_abi(native_wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(native_wheel) as archive:
        library = Path(archive.extract("kdkernels/_C_cpu.abi3.so", tmp_path))
    wanted = foreign_symbols(library)
    assert any(name.startswith("aoti_torch_") for name in wanted)
    assert not any(name.startswith("Py") for name in wanted)
    assert [name for name in wanted if not is_stable(name)] == []


def test_an_nvcc_that_is_required_and_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere the tests that need it are left out, which a job that installed it would not show."""
    monkeypatch.setattr("toolchain.shutil.which", lambda *_, **__: None)
    monkeypatch.delenv("KDKERNELS_REQUIRE_NVCC", raising=False)
    assert find_nvcc() is None
    monkeypatch.setenv("KDKERNELS_REQUIRE_NVCC", "1")
    with pytest.raises(RuntimeError, match="KDKERNELS_REQUIRE_NVCC is set, but there is no nvcc"):
        find_nvcc()


def cuobjdump() -> str:
    """The CUDA toolkit's, or Triton's copy of it."""
    found = shutil.which("cuobjdump")
    if found is None:
        from triton import knobs

        found = knobs.nvidia.cuobjdump.path
    return found


@needs_compiler
@needs_nvcc
def test_nvcc_compiles_for_gpus_without_one(tmp_path: Path) -> None:
    said = build(tmp_path, native=ROOT / "build" / "native", KDKERNELS_BUILD="cuda")
    assert "built kdkernels._C_cuda with nvcc" in said
    assert info(tmp_path)["cuda"]["architectures"][:2] == ["8.0", "9.0"]
    library = tmp_path / "kdkernels" / "_C_cuda.abi3.so"
    wanted = foreign_symbols(library)
    assert "aoti_torch_get_current_cuda_stream" in wanted
    assert [name for name in wanted if not is_stable(name)] == []
    listed = subprocess.run([cuobjdump(), "--list-elf", str(library)], capture_output=True, text=True, check=True).stdout
    assert {"sm_80", "sm_90"} <= set(re.findall(r"sm_\d+", listed))
