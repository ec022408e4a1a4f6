"""What `backend_info` and `kdkernels info` say of the backend that `auto` takes for each primitive, and why."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from choice_support import FUSED, PRIMITIVES, UNFUSED, forget, table, two_backends
from cli import kdkernels as command

import kdkernels
from kdkernels import backend, native
from kdkernels.tables import DTYPES, LAYOUTS, SIZES

OTHERS = "all other kinds of calls, which were not measured"


def passes(why: str) -> dict[str, str]:
    """`UNFUSED`, where there is another reason that the passes are not one launch."""
    return {**UNFUSED, "terms_persistent": f"made of other primitives, {why}"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with two_backends(tmp_path, monkeypatch):
        yield tmp_path


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


@pytest.mark.usefixtures("gpu")
def test_info_says_which_backend_each_primitive_uses_and_why(folder: Path) -> None:
    entries = {
        "terms bf16 contiguous large": (0.15, 0.12),
        "channel_mean bf16 contiguous large": (1.0, 1.5),
        "channel_mean fp32 contiguous large": (2.0, 4.0),
        "channel_mean fp32 channels_last large": (3.0, 2.0),
        "attention fp16 channels_last small": (1.0, 1.0),
        **{" ".join(("map_distance", *kind)): (2.0, 1.0) for kind in product(DTYPES.values(), LAYOUTS, SIZES)},
    }
    (folder / "sm_90.json").write_text(table(entries))
    info = kdkernels.backend_info()
    twice = "measured faster: 1 ms against 2 ms of triton"
    assert info["native"]["primitives"] == {
        "terms": "measured faster: 0.12 ms against 0.15 ms of triton (sm_90, bf16, contiguous, large)",
        "channel_mean": "measured faster: 2 ms against 3 ms of triton (sm_90, fp32, channels_last, large)",
        "map_distance": f"{twice} (sm_90, fp32, contiguous, small, and 17 more of 18 measured kinds of calls)",
    }
    triton = info["triton"]["primitives"]
    several = "measured faster: 2 ms against 4 ms of native (sm_90, fp32, contiguous, large, and 1 more of 3 measured kinds of calls)"
    assert triton.pop("channel_mean") == f"{several}; {OTHERS}"
    assert triton.pop("attention") == f"measured as fast: 1 ms against 1 ms of native (sm_90, fp16, channels_last, small); {OTHERS}"
    assert triton.pop("terms") == OTHERS
    assert set(triton) == set(FUSED) - {"terms", "channel_mean", "attention", "map_distance"}
    assert set(triton.values()) == {"no measurement for this GPU (sm_90): Triton"}
    assert info["reference"]["primitives"] == UNFUSED
    assert [entry["active"] for entry in info.values()] == [False, True, True]


@pytest.mark.usefixtures("gpu")
def test_info_of_the_one_launch_says_when_it_is_the_fastest_and_when_the_passes_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes are those of whichever backends."""
    entries = {"terms_persistent bf16 contiguous large": (0.2, 0.15)}
    (folder / "sm_90.json").write_text(table(entries))
    info = kdkernels.backend_info()
    said = "measured faster: 0.15 ms against 0.2 ms of the passes (sm_90, bf16, contiguous, large)"
    assert info["native"]["primitives"] == {"terms_persistent": said}
    assert info["reference"]["primitives"]["terms_persistent"] == f"made of other primitives: {OTHERS}"
    assert "terms_persistent" not in info["triton"]["primitives"] and info["native"]["active"]
    (folder / "sm_90.json").write_text(table({**entries, "terms_persistent fp32 contiguous small": (0.1, 0.2)}))
    forget()
    info = kdkernels.backend_info()
    slower = "measured faster: 0.1 ms against 0.2 ms of one launch (sm_90, fp32, contiguous, small)"
    assert info["native"]["primitives"] == {"terms_persistent": said}
    assert info["reference"]["primitives"]["terms_persistent"] == f"made of other primitives: {slower}; {OTHERS}"
    assert [name for name, entry in info.items() if entry["active"]] == ["triton", "native"]
    monkeypatch.setitem(native._loaded, "cuda", native.Library(None, "it was not built"))
    info = kdkernels.backend_info()
    assert info["native"]["primitives"] == {} and not info["native"]["active"]
    assert info["reference"]["primitives"] == passes("not 'native': it was not built")
    for name in ("triton", "reference"):
        monkeypatch.setattr(backend, "_choice", name)
        told = kdkernels.backend_info()["reference"]["primitives"]["terms_persistent"]
        assert told == f"made of other primitives, as {name!r} is named"


@pytest.mark.usefixtures("gpu")
def test_info_without_a_table_without_triton_and_without_both(monkeypatch: pytest.MonkeyPatch) -> None:
    def given(name: str) -> set[str]:
        return set(kdkernels.backend_info()[name]["primitives"].values())

    assert given("triton") == {"no measurement for this GPU (sm_90): Triton"} and given("native") == set()
    monkeypatch.setattr(backend, "_TRITON_INSTALLED", False)
    assert given("native") == {"not 'triton': triton is not installed"} and given("triton") == set()
    monkeypatch.setitem(native._loaded, "cuda", native.Library(None, "it was not built"))
    unbuilt = "not 'native': it was not built"
    assert given("reference") == {*passes(unbuilt).values(), f"not 'triton': triton is not installed, {unbuilt}"}
    assert [name for name, entry in kdkernels.backend_info().items() if entry["active"]] == ["reference"]


def test_info_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(native._loaded, "cpu", native.Library(None, ""))
    monkeypatch.setitem(native._loaded, "cuda", native.Library(None, "there is no CUDA device"))
    info = kdkernels.backend_info()
    assert info["native"]["primitives"] == dict.fromkeys(FUSED, "the only one with kernels for a CPU")
    assert info["native"]["libraries"] == {"cpu": "", "cuda": "there is no CUDA device"}
    assert info["reference"]["primitives"] == passes("as its kernel is for a GPU, and there is none") and info["triton"]["primitives"] == {}
    monkeypatch.setitem(native._loaded, "cpu", native.Library(None, "it was not built"))
    assert kdkernels.backend_info()["reference"]["primitives"]["terms"] == "not 'native': it was not built"


@pytest.mark.usefixtures("gpu")
def test_info_of_a_named_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(native._loaded, "cpu", native.Library(None, ""))
    kdkernels.set_backend("native")
    assert set(kdkernels.backend_info()["native"]["primitives"].values()) == {"named"}
    monkeypatch.setitem(native._loaded, "cuda", native.Library(None, "it was not built"))
    info = kdkernels.backend_info()
    assert info["native"]["available"] and info["native"]["active"] and not info["triton"]["active"]
    assert info["native"]["reason"] == "" and info["native"]["libraries"] == {"cpu": "", "cuda": "it was not built"}
    assert set(info["native"]["primitives"].values()) == {"named, but calls raise: it was not built"}
    kdkernels.set_backend("reference")
    assert kdkernels.backend_info()["reference"]["primitives"].keys() == {*PRIMITIVES, *UNFUSED}
    monkeypatch.setattr(backend, "_choice", "fast")
    assert all(entry["primitives"] == {} and not entry["active"] for entry in kdkernels.backend_info().values())


@pytest.mark.usefixtures("gpu")
def test_the_command_shows_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (folder / "sm_90.json").write_text(table({"terms bf16 contiguous large": (0.15, 0.12)}))
    text = command("info").stdout
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")]
    assert "primitives on a GPU" in text
    assert ["terms", "native", "measured faster: 0.12 ms against 0.15 ms of triton (sm_90, bf16, contiguous, large)"] in rows
    assert ["terms", "triton", OTHERS] in rows
    assert ["terms_vjp", "triton", "no measurement for this GPU (sm_90): Triton"] in rows
    (folder / "sm_90.json").write_text("[]")
    forget()
    failed = command("info")
    assert failed.exit_code == 2 and "no table of times of backends" in " ".join(failed.stderr.split())
