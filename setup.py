"""Builds the package, with the benchmarks inside, and of the native library (csrc/) what this machine can; pyproject.toml has the metadata.

KDKERNELS_BUILD   auto (default): what can be built, saying what is left out and why; cpu, cuda (which includes cpu): these, or an error;
                  none: nothing
CXX, MAX_JOBS     the C++ compiler, the number of compiler processes
CUDA_HOME         where CUDA's toolkit is;   TORCH_CUDA_ARCH_LIST: for which GPUs, such as 8.0;9.0+PTX

docs/install.md explains. _build_info.json, beside the libraries, tells the package what became of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError
from setuptools.modified import newer_group

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "cuda", "none")
#: The oldest torch that the library runs on, whichever it is built with: it uses nothing of torch but the stable ABI.
TARGET = (2, 11)
COMMON_FLAGS = ["-std=c++17", "-O3", f"-DTORCH_TARGET_VERSION=0x{TARGET[0]:02x}{TARGET[1]:02x}{0:012x}"]
# Without contraction all instruction sets round alike. Debugging symbols, which some Pythons' own flags ask for, would double the size.
CPU_FLAGS = [*COMMON_FLAGS, "-g0", "-ffp-contract=off", "-fvisibility=hidden"]
CUDA_FLAGS = [*COMMON_FLAGS, "-DUSE_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xfatbin=-compress-all"]
ARCHITECTURES = ("8.0", "9.0", "10.0")
INFO = Path("kdkernels", "_build_info.json")


class Unbuildable(Exception):
    """Why a library cannot be built here."""


class Unwanted(Unbuildable):
    """It is not asked for."""


class BuildWithBenchmarks(build_py):
    """A wheel holds benchmarks/ as kdkernels.benchmarks, so that `kdkernels bench` works without a checkout. An editable install
    finds them in the checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "kdkernels" / "benchmarks"
        shutil.rmtree(target, ignore_errors=True)  # of an earlier build, which may have had files that are no more
        for source in sorted(Path("benchmarks").rglob("*.py")):
            file = target / source.relative_to("benchmarks")
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, file)


class BuildNative(build_ext):
    """Builds the libraries that KDKERNELS_BUILD asks for, drops the others from the distribution, and writes down both."""

    def initialize_options(self) -> None:
        super().initialize_options()
        # One place for every kind of build: an editable install would compile anew, in a folder of its own, what is there already.
        self.build_temp: str = str(Path("build", "native"))

    def build_extensions(self) -> None:
        self.info: dict[str, Any] = {
            "version": self.distribution.get_version(),
            "target": ".".join(map(str, TARGET)),
            "torch": None,
        }
        # In place: the list is the distribution's, from which the wheel's tag follows. Of all, as it may have lost some before.
        self.extensions[:] = [extension for extension in LIBRARIES if self.attempt(extension)]
        file = Path(self.build_lib) / INFO
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.info, indent=2) + "\n", encoding="utf-8")

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        self.copy_file(str(Path(self.build_lib) / INFO), str(INFO))
        for name in ("cpu", "cuda"):
            if not self.info[name]["built"]:
                (ROOT / self.get_ext_filename(f"kdkernels._C_{name}")).unlink(missing_ok=True)

    def attempt(self, extension: Extension) -> bool:
        """Builds a library and records it; false where it is left out. Raises SetupError where it was asked for."""
        name = extension.name.rpartition("_")[2]
        mode = chosen_mode()
        try:
            if mode == "none" or (mode == "cpu" and name == "cuda"):
                raise Unwanted(f"KDKERNELS_BUILD={mode}")
            built = self.build_cpu(extension) if name == "cpu" else self.build_cuda(extension)
        except Exception as why:  # whatever goes wrong, the Python part installs
            if mode != "auto" and not isinstance(why, Unwanted):
                raise SetupError(f"KDKERNELS_BUILD={mode}, but {extension.name} cannot be built: {why}") from why
            reason = str(why) if isinstance(why, Unbuildable) else f"{type(why).__name__}: {why}"
        else:
            self.info[name] = {"built": True, "reason": "", **built}
            print(f"kdkernels: built {extension.name} with {built['compiler']}")
            return True
        # Of an earlier build, which may have had it.
        Path(self.build_lib, self.get_ext_filename(extension.name)).unlink(missing_ok=True)
        self.info[name] = {"built": False, "reason": reason, "compiler": "", "flags": []}
        print(f"kdkernels: left out {extension.name}: {reason}", file=sys.stderr)
        return False

    def build_cpu(self, extension: Extension) -> dict[str, Any]:
        if sys.platform == "win32":
            raise Unbuildable("its sources are for g++ and clang++")
        self.info["torch"], folder = find_torch()
        compiler = find_compiler()
        extension.include_dirs, extension.library_dirs = [str(folder / "include")], [str(folder / "lib")]
        # For torch.utils.cpp_extension and what it calls, which take the C compiler for some of the work.
        os.environ["CXX"] = os.environ["CC"] = shlex.join(compiler)
        os.environ["TORCH_DONT_CHECK_COMPILER_ABI"] = "1"  # of C++, which does not matter here
        if shutil.which("ninja") is None:  # a virtual environment's, which nobody needs to activate
            os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
        from torch.utils.cpp_extension import BuildExtension

        command = BuildExtension(Distribution({"name": "kdkernels", "ext_modules": [extension]}))
        command.build_lib, command.build_temp = self.build_lib, str(Path(self.build_temp, "cpu"))
        command.ensure_finalized()
        try:
            with last_lines() as lines:
                command.run()
        except Exception as error:  # of distutils, of ninja, of torch: the compiler's own lines say more
            raise failure(lines or [str(error)]) from error
        return {"compiler": first_line([*compiler, "--version"]), "flags": CPU_FLAGS}

    def build_cuda(self, extension: Extension) -> dict[str, Any]:
        """By nvcc itself: torch.utils.cpp_extension builds for CUDA only where torch itself was built for the same CUDA."""
        if not self.info["cpu"]["built"]:
            raise Unbuildable("it needs the library for the CPU, which was not built")
        nvcc = find_nvcc()
        architectures, targets = find_architectures(nvcc)
        _, folder = find_torch()
        host = find_compiler()
        # Of "ccache g++" nvcc could not make anything: then it takes the compiler that it finds.
        base = [nvcc, *(["-ccbin", *host] if len(host) == 1 else []), *targets]
        compile_ = [*base, *CUDA_FLAGS, "-isystem", str(folder / "include"), "-c"]
        # What another command has made is left alone.
        objects = Path(self.build_temp, "cuda", hashlib.sha1(shlex.join(compile_).encode()).hexdigest()[:12])
        files = [objects / f"{source}.o" for source in extension.sources]
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        library = Path(self.build_lib, self.get_ext_filename(extension.name))
        # libtorch, of which nothing is used, brings torch's library for CUDA, which a torch without CUDA lacks.
        # The toolkit that pip installs has its own libraries where nvcc does not look.
        paths = [f"-L{folder / 'lib'}", f"-L{Path(nvcc).parents[1] / 'lib'}"]
        # First the standard library: libraries that torch brings have parts of it inside and open.
        torch = [*paths, "-lstdc++", "-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu"]
        try:
            with last_lines() as lines, ThreadPoolExecutor(jobs) as pool:
                list(pool.map(lambda source, file: compile_one(compile_, source, file, extension.depends), extension.sources, files))
                library.parent.mkdir(parents=True, exist_ok=True)
                run([*base, "-shared", "-o", str(library), *map(str, files), *torch])
        except (OSError, subprocess.CalledProcessError) as error:
            raise failure(lines or [str(error)]) from error
        release = re.search(r"release [\d.]+", subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout)
        compiler = f"nvcc {release[0] if release else ''}, {first_line([*host, '--version'])}"
        return {"compiler": compiler, "flags": CUDA_FLAGS, "architectures": architectures}


class Wheel(bdist_wheel):
    """Its tag says what is inside: for one system, though for any Python, with a library, and for all systems without."""

    def finalize_options(self) -> None:
        if not sysconfig.get_config_var("Py_GIL_DISABLED"):
            self.py_limited_api = "cp310"
        super().finalize_options()

    def run_command(self, command: str) -> None:
        super().run_command(command)
        if command == "build":
            self.root_is_pure = not self.distribution.has_ext_modules()


def chosen_mode() -> str:
    mode = os.environ.get("KDKERNELS_BUILD") or "auto"
    if mode not in MODES:
        raise SetupError(f"KDKERNELS_BUILD is one of {', '.join(MODES)}; got {mode!r}")
    return mode


def find_torch() -> tuple[str, Path]:
    """Version and folder of the torch to build with: any of TARGET or newer, whose headers are all that is used of it.

    pip builds in an environment of its own, without torch: then that of the environment which it installs to.
    """
    if find_spec("torch") is None:
        installed = (sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
        # At the end: what the build's own environment has comes first.
        sys.path.extend(folder for folder in dict.fromkeys(installed) if Path(folder, "torch", "version.py").is_file())
    wanted = ".".join(map(str, TARGET))
    if find_spec("torch") is None:
        raise Unbuildable(f"there is no torch to build with: first install torch>={wanted}, then pip install --no-build-isolation .")
    try:
        import torch
    except Exception as error:  # a broken installation may raise anything
        raise Unbuildable(f"torch cannot be imported: {error}") from error
    version = str(torch.__version__)
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < TARGET:
        raise Unbuildable(f"it needs torch {wanted} or newer to build with, this is {version}")
    return version, Path(torch.__file__).parent


def find_compiler() -> list[str]:
    """The C++ compiler, as CXX has it or the first that is there."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen and shutil.which(chosen[0]) is None:
        raise Unbuildable("there is no C++ compiler: the one that CXX names is not there")
    found = chosen or [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    if not found:
        raise Unbuildable("there is no C++ compiler (c++, g++, clang++ or what CXX names)")
    return found


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        found = shutil.which("nvcc", path=str(Path(home, "bin")))
    else:
        found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        raise Unbuildable("there is no nvcc " + ("in CUDA_HOME" if home else "on the path, and CUDA_HOME is not set"))
    return found


def find_architectures(nvcc: str) -> tuple[list[str], list[str]]:
    """What TORCH_CUDA_ARCH_LIST asks for, by default those of ARCHITECTURES that nvcc knows, and nvcc's options for it."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
    known = set(re.findall(r"compute_(\d+)", listed))
    chosen = re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; "))
    if chosen == [""]:
        chosen = [name for name in ARCHITECTURES if name.replace(".", "") in known]
        if not chosen:
            raise Unbuildable(f"nvcc knows none of {', '.join(ARCHITECTURES)}")
        chosen[-1] += "+PTX"
    options = []
    for name in chosen:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if match is None:
            raise Unbuildable(f"TORCH_CUDA_ARCH_LIST holds numbers such as 9.0 or 10.0+PTX; got {name!r}")
        if match[1] + match[2] not in known:
            raise Unbuildable(f"nvcc does not know {name} of TORCH_CUDA_ARCH_LIST")
        number = match[1] + match[2] + match[3]
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[4]:
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return chosen, options


def compile_one(command: Sequence[str], source: str, target: Path, depends: list[str]) -> None:
    """Compiles where the source or a header has changed."""
    if newer_group([source, *depends], str(target)):
        target.parent.mkdir(parents=True, exist_ok=True)
        run([*command, source, "-o", str(target)])


def run(words: Sequence[str]) -> None:
    print(shlex.join(words), flush=True)
    subprocess.run(words, check=True)


def first_line(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.partition("\n")[0]


def failure(lines: Sequence[str]) -> Unbuildable:
    """What the compiler said: its error, without this machine's folders, and in the message of a build its last lines."""
    print("kdkernels: the compiler failed. Its last lines:", *lines, sep="\n  ", file=sys.stderr)
    error = next((line for line in lines if "error" in line.lower()), lines[-1])
    return Unbuildable("the compiler failed: " + re.sub(r"(?<![\w.+-])(?:/[^/\s:'\"]+)+/", "", error).strip())


@contextmanager
def last_lines(count: int = 20) -> Iterator[deque[str]]:
    """Collects the last lines that this process and those that it starts print meanwhile; all of them are printed too."""
    lines: deque[str] = deque(maxlen=count)
    reading, writing = os.pipe()
    kept = os.dup(1), os.dup(2)

    def copy() -> None:
        with os.fdopen(reading, errors="replace") as pipe, os.fdopen(os.dup(kept[0]), "w") as screen:
            for line in pipe:
                screen.write(line)
                screen.flush()
                lines.append(line.rstrip())

    thread = threading.Thread(target=copy)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for number in (1, 2):
        os.dup2(writing, number)
    os.close(writing)
    thread.start()
    try:
        yield lines
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, original in enumerate(kept, start=1):
            os.dup2(original, number)
        thread.join()
        for original in kept:
            os.close(original)


def sources(*patterns: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


chosen_mode()
LIBRARIES = [
    Extension(
        "kdkernels._C_cpu",
        sources("*.cpp", "cpu/*.cpp"),
        depends=sources("include/*.h", "cpu/*.h", "cpu/*.inl"),
        extra_compile_args=CPU_FLAGS,
        libraries=["torch_cpu"],
        py_limited_api=True,
    ),
    Extension(
        "kdkernels._C_cuda",
        sources("map_options.cpp", "pyramid.cpp", "terms.cpp", "cuda/*.cu"),
        depends=sources("include/*.h", "cuda/*.h", "cpu/parallel.h"),
        py_limited_api=True,
    ),
]
setup(
    cmdclass={"build_py": BuildWithBenchmarks, "build_ext": BuildNative, "bdist_wheel": Wheel},
    ext_modules=list(LIBRARIES),
)
