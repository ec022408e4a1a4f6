"""On which GPUs, that need not be there, the library for CUDA is used: those that can run what is in it, with their driver."""

from __future__ import annotations

import ctypes
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from choice_support import UNFUSED, level, taken, two_backends
from cli import kdkernels as command
from torch._subclasses import FakeTensorMode

import kdkernels
from kdkernels import backend, native

NAME = "_C_cuda.abi3.so"
DEFAULT = ("8.0", "9.0", "10.0+PTX")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with two_backends(tmp_path, monkeypatch):
        monkeypatch.setitem(native._loaded, "cpu", native.Library(tmp_path / "_C_cpu.abi3.so", ""))
        monkeypatch.setitem(native._loaded, "cuda", native.Library(tmp_path / NAME, ""))
        monkeypatch.setattr(native, "_of_driver", lambda: (13, 0))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        yield tmp_path


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Compute capabilities of the GPUs that there are."""
    there: list[tuple[int, int]] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: there[index])
    return there


@pytest.fixture
def available(gpus: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says so too. Tensors without memory would then start CUDA."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"a GPU of compute capability {gpus[index]}")


def built(folder: Path, architectures: Sequence[str] = DEFAULT, compiler: str = "nvcc release 13.0, c++ 12.2.0") -> None:
    info = {"built": True, "reason": "", "compiler": compiler, "flags": ["-O3"], "architectures": list(architectures)}
    (folder / "_build_info.json").write_text(json.dumps({"version": kdkernels.__version__, "cuda": info}))


@pytest.mark.parametrize(
    ("architectures", "chip", "runs"),
    [
        # Machine code runs on GPUs of its major number, of its minor number or higher.
        *((DEFAULT, chip, True) for chip in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3))),
        (("8.6", "9.0"), (8, 0), False),
        (("9.0",), (8, 0), False),
        (("9.0",), (10, 0), False),
        # PTX runs on all that are newer.
        (DEFAULT, (12, 0), True),
        (DEFAULT, (7, 5), False),
        (DEFAULT, (7, 0), False),
        (("7.0+PTX", "9.0"), (7, 5), True),
        (("7.0+PTX", "9.0"), (8, 6), True),
        (("8.6+PTX",), (8, 0), False),
        # What one GPU or its family has is not for others.
        (("9.0a+PTX",), (9, 0), True),
        (("9.0a+PTX",), (10, 0), False),
        (("10.0a",), (10, 3), False),
        (("10.0f+PTX",), (10, 3), True),
        (("10.0f+PTX",), (12, 0), False),
        (("10.3f",), (10, 0), False),
        # Nor are integrated GPUs' and others' machine code for each other.
        (("8.0",), (8, 7), False),
        (("8.7",), (8, 9), False),
        (("8.7",), (8, 7), True),
        (("8.0+PTX",), (8, 7), True),
    ],
)
def test_a_gpu_is_served_where_it_can_run_what_was_built(
    folder: Path, gpus: list[tuple[int, int]], architectures: Sequence[str], chip: tuple[int, int], runs: bool
) -> None:
    gpus.append(chip)
    built(folder, architectures)
    said = f"{NAME}: it was built for compute capability {' '.join(architectures)}, cuda:0 has {chip[0]}.{chip[1]}"
    assert native.refuses("cuda", 0) == native.refuses("cuda") == ("" if runs else said)
    assert native.refuses("cpu") == ""


@pytest.mark.parametrize("text", ["", '{"cuda": {}}', '{"cuda": {"architectures": []}}'])
def test_where_it_is_not_known_what_was_built_nothing_is_refused(folder: Path, gpus: list[tuple[int, int]], text: str) -> None:
    gpus.append((7, 5))
    (folder / "_build_info.json").write_text(text)
    assert native.refuses("cuda", 0) == ""


@pytest.mark.parametrize(
    ("driver", "chip", "refused"),
    [
        ((13, 1), (12, 0), False),
        ((13, 0), (12, 0), True),
        ((13, 0), (9, 0), False),
        (None, (12, 0), False),
    ],
)
def test_a_driver_knows_no_ptx_newer_than_itself(
    folder: Path,
    gpus: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    driver: tuple[int, int] | None,
    chip: tuple[int, int],
    refused: bool,
) -> None:
    monkeypatch.setattr(native, "_of_driver", lambda: driver)
    gpus.append(chip)
    built(folder, compiler="nvcc release 13.1, c++ 12.2.0")
    said = f"{NAME}: for cuda:0, 12.0, it has only PTX of CUDA 13.1, the driver is for CUDA 13.0"
    assert native.refuses("cuda", 0) == (said if refused else "")


@pytest.mark.usefixtures("available")
@pytest.mark.parametrize(
    ("driver", "compiler", "said"),
    [
        ((12, 8), "nvcc release 13.0, c++ 12.2.0", "it was built with CUDA 13.0, the driver is for CUDA 12.8"),
        ((12, 4), "nvcc release 12.8, c++ 12.2.0", ""),
        ((13, 0), "nvcc release 12.8, c++ 12.2.0", ""),
        (None, "nvcc release 13.0, c++ 12.2.0", ""),
        ((12, 8), "", ""),
    ],
)
def test_a_driver_of_an_older_major_release_does_not_do(
    folder: Path,
    gpus: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    driver: tuple[int, int] | None,
    compiler: str,
    said: str,
) -> None:
    """That torch has a GPU says nothing of it: torch may be for an older CUDA than the library."""
    gpus.append((9, 0))
    monkeypatch.setattr(native, "_of_driver", lambda: driver)
    monkeypatch.setattr(native, "_open", lambda file: "")
    monkeypatch.setattr(native, "_lacking", lambda key: "")
    built(folder, compiler=compiler)
    (folder / NAME).touch()
    assert native.load("cuda", folder).reason == (said and f"{NAME}: {said}")


def test_the_driver_says_what_it_is_for_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    class Driver:
        def __init__(self, name: str) -> None:
            assert name == "libcuda.so.1"

        def cuDriverGetVersion(self, version: object) -> int:  # noqa: N802
            version._obj.value = 12080  # type: ignore[attr-defined]
            return 0

    asked = native._of_driver.__wrapped__
    monkeypatch.setattr(ctypes, "CDLL", Driver)
    assert asked() == (12, 8)
    monkeypatch.setattr(Driver, "cuDriverGetVersion", lambda self, version: 1)
    assert asked() is None
    monkeypatch.setattr(ctypes, "CDLL", lambda name: ctypes.PyDLL("there is no such file"))
    assert asked() is None


@pytest.mark.gpu
def test_the_driver_of_a_gpu_is_for_the_cuda_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    driver = native._of_driver()
    assert driver is not None and driver[0] >= int(str(torch.version.cuda).partition(".")[0])


@pytest.mark.usefixtures("available")
def test_a_torch_for_gpus_of_another_make_has_no_use_for_the_library(
    folder: Path, gpus: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus.append((9, 4))
    monkeypatch.setattr(torch.version, "cuda", None)
    (folder / NAME).touch()
    assert native.load("cuda", folder).reason == f"{NAME}: this torch is for GPUs of another make"


def on(index: int) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty((2, 4, 2, 8), device=f"cuda:{index}")


def test_each_gpu_is_asked_once_and_by_itself(folder: Path, gpus: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    gpus.extend([(9, 0), (7, 5)])
    built(folder)
    monkeypatch.setattr(backend, "_TRITON_INSTALLED", False)
    assert [taken(on(index)) for index in (0, 1)] == ["native", "reference"]
    (folder / "_build_info.json").write_text("{}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: pytest.fail("asked"))
    assert native.refuses("cuda", 0) == ""
    assert native.refuses("cuda", 1) == f"{NAME}: it was built for compute capability 8.0 9.0 10.0+PTX, cuda:1 has 7.5"


def test_auto_falls_back_where_a_gpu_cannot_run_the_library_and_a_named_native_raises(
    folder: Path, gpus: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpus.append((7, 5))
    built(folder)
    said = f"{NAME}: it was built for compute capability 8.0 9.0 10.0+PTX, cuda:0 has 7.5"
    assert taken(level()) == "triton"
    monkeypatch.setattr(backend, "_TRITON_INSTALLED", False)
    with caplog.at_level(logging.INFO, logger="kdkernels"):
        assert taken(level()) == taken(level()) == "reference"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"using 'reference' for channel_mean, not 'triton': triton is not installed, not 'native': {said}" in caplog.text
    monkeypatch.setattr(backend, "_choice", "native")
    with pytest.raises(RuntimeError, match="backend 'native' cannot run channel_mean: .*, cuda:0 has 7.5"):
        taken(level())


@pytest.mark.usefixtures("available")
def test_info_says_which_library_a_gpu_cannot_run(folder: Path, gpus: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    gpus.extend([(7, 5), (9, 0)])
    built(folder)
    said = f"{NAME}: it was built for compute capability 8.0 9.0 10.0+PTX, cuda:0 has 7.5"
    info = kdkernels.backend_info()
    assert info["native"]["libraries"] == {"cpu": "", "cuda": said}
    assert info["native"]["available"] and info["native"]["reason"] == "" and info["native"]["primitives"] == {}
    assert info["triton"]["primitives"]["terms"] == f"not 'native': {said}"
    assert info["reference"]["primitives"] == {**UNFUSED, "terms_persistent": f"made of other primitives, not 'native': {said}"}
    monkeypatch.setattr(native, "build_info", lambda folder=folder, read=native.build_info: read(folder))
    monkeypatch.setattr(native, "capability", lambda: "scalar")
    lines = [line.strip() for line in command("info").stdout.splitlines()]
    assert f"cuda: {folder / NAME}, for 8.0 9.0 10.0+PTX" in lines and f"not on cuda:0: {said}" in lines
    assert not any(line.startswith("not on cuda:1") for line in lines)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert kdkernels.backend_info()["native"]["libraries"] == {"cpu": "", "cuda": ""}
