"""The choice of the backend: what can be named, what is refused and why, and what `auto` says."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch
from test_import import run

import kdkernels
from kdkernels import backend, functional, native

#: Of `auto` for features on the CPU.
FASTEST = "reference" if native.library().reason else "native"
UNBUILT = native.Library(None, "this installation has no compiled library")


@pytest.fixture(autouse=True)
def restore(monkeypatch):
    monkeypatch.setattr(backend, "_choice", "auto")
    monkeypatch.setattr(backend, "_fallbacks_told", set())


@pytest.fixture
def unbuilt(monkeypatch):
    """kdkernels without a compiled library, as where there is no compiler."""
    monkeypatch.setitem(native._loaded, "cpu", UNBUILT)


def active() -> list[str]:
    return [name for name, info in kdkernels.backend_info().items() if info["active"]]


def test_info_says_for_each_backend_whether_it_runs_and_why_not():
    info = kdkernels.backend_info()
    assert list(info) == ["reference", "triton", "native"]
    for name, entry in info.items():
        own = {"libraries"} if name == "native" else set()
        assert set(entry) == {"available", "active", "reason", "version", "primitives"} | own
        assert bool(entry["reason"]) != entry["available"], name
    assert info["reference"]["available"] and info["reference"]["version"] == torch.__version__
    assert active() == [FASTEST]


@pytest.mark.parametrize(("name", "used"), [("auto", FASTEST), ("reference", "reference")])
def test_a_backend_that_runs_can_be_chosen(name, used):
    kdkernels.set_backend(name)
    assert active() == [used]
    assert functional.channel_mean([torch.full((1, 2, 3, 4), 2.0)])[0].tolist() == [[2.0, 2.0]]


def test_naming_a_backend_that_cannot_run_gives_the_reason_and_changes_nothing(unbuilt):
    found = {"available": False, "active": False, "reason": UNBUILT.reason, "version": None, "primitives": {}}
    told = kdkernels.backend_info()["native"]
    libraries = told.pop("libraries")
    assert told == found and libraries["cpu"] == UNBUILT.reason and libraries["cuda"]
    with pytest.raises(RuntimeError, match=f"'native' cannot run: {UNBUILT.reason}"):
        kdkernels.set_backend("native")
    assert active() == ["reference"]
    functional.channel_mean([torch.ones(1, 1, 1, 1)])


@pytest.mark.parametrize("name", ["cuda", "", "Reference"])
def test_an_unknown_backend_lists_the_known_ones(name):
    with pytest.raises(ValueError, match="auto, reference, triton, native"):
        kdkernels.set_backend(name)
    assert active() == [FASTEST]


def test_auto_tells_its_fallback_once(caplog, unbuilt):
    with caplog.at_level(logging.INFO, logger="kdkernels"):
        for _ in range(3):
            functional.channel_mean([torch.ones(1, 1, 1, 1)])
    # Nobody asked for a library, so nothing has gone wrong.
    assert [(record.name, record.levelno) for record in caplog.records] == [("kdkernels", logging.INFO)]
    assert f"using 'reference' for channel_mean, not 'native': {UNBUILT.reason}" in caplog.text


def test_a_named_reference_has_nothing_to_tell(caplog):
    kdkernels.set_backend("reference")
    with caplog.at_level(logging.INFO, logger="kdkernels"):
        functional.channel_mean([torch.ones(1, 1, 1, 1)])
    assert caplog.records == []


@pytest.mark.parametrize(
    ("value", "error"),
    [("", None), ("AUTO ", None), ("reference", None), ("triton", None), ("native", RuntimeError), ("fast", ValueError)],
)
def test_the_environment_chooses(monkeypatch, unbuilt, value, error):
    monkeypatch.setenv("KDKERNELS_BACKEND", value)
    monkeypatch.setattr(backend, "_choice", backend.from_environment())
    kdkernels.backend_info()
    with contextlib.nullcontext() if error is None else pytest.raises(error, match="reference"):
        functional.channel_mean([torch.ones(1, 1, 1, 1)])
    kdkernels.set_backend("reference")
    assert functional.channel_mean([torch.ones(1, 1, 1, 1)])[0].item() == 1


def test_an_environment_that_cannot_run_does_not_stop_the_import_but_the_first_use():
    code = """
import torch, kdkernels
kdkernels.native._loaded["cpu"] = kdkernels.native.Library(None, "there is none")
try:
    kdkernels.functional.channel_mean([torch.ones(1, 1, 1, 1)])
except RuntimeError as error:
    print(error)
"""
    assert "'native' cannot run channel_mean: there is none" in run(code, KDKERNELS_BACKEND="native")


def test_every_primitive_is_registered():
    # The one launch is a faster way of what `fused` does, and nothing to call.
    primitives = set(backend._implementations["reference"]) - {"terms_persistent"}
    assert {name for name in functional.__all__ if getattr(functional, name).__module__.startswith("kdkernels.ops.")} == primitives
    assert all(set(offered) == set(backend._implementations["reference"]) for offered in backend._implementations.values())


def test_autocast_around_a_primitive_changes_nothing():
    x = [torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))]
    plain = functional.attention(x)[0][0], functional.channel_mean(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = functional.attention(x)[0][0], functional.channel_mean(x)[0]
    assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(plain, inside, strict=True))


def test_triton_is_there_when_interpreted_or_on_a_gpu_and_says_why_not_otherwise():
    code = "import kdkernels; print(kdkernels.backend_info()['triton'])"
    assert "'available': True" in run(code, TRITON_INTERPRET="1")
    told = run(code, TRITON_INTERPRET="0")
    assert ("'available': True" in told) == torch.cuda.is_available()
    assert torch.cuda.is_available() or "there is no CUDA device" in told


def test_auto_leaves_interpreted_kernels_alone_and_a_named_triton_uses_them():
    x = [torch.ones(1, 2, 3, 4)]
    assert backend.resolve("channel_mean", x, x, "signed") is backend._implementations[FASTEST]["channel_mean"].function
    kdkernels.set_backend("triton")
    assert backend.resolve("channel_mean", x, x, "signed") is backend._implementations["triton"]["channel_mean"].function


def test_a_named_triton_says_what_it_cannot_do():
    kdkernels.set_backend("triton")
    with pytest.raises(RuntimeError, match="cannot run channel_mean: it does not take float64"):
        functional.channel_mean([torch.ones(1, 1, 1, 1, dtype=torch.float64)])
    with pytest.raises(RuntimeError, match="a weight per element is in the reference only"):
        functional.weighted_channel_sum([torch.ones(1, 1, 2, 2)], [torch.ones(1, 1, 2, 2)])
    assert functional.channel_mean([]) == []


@pytest.mark.parametrize("name", ["auto", "triton", "native"])
def test_transformations_work_on_the_reference_and_no_fused_kernel_loses_a_tangent(name, monkeypatch):
    monkeypatch.setitem(native._loaded, "cpu", native.Library(None, ""))
    kdkernels.set_backend(name)
    x = torch.randn(2, 3, 4, 5)

    def means(x):
        return functional.channel_mean([x])[0]

    calls = {
        "vmap": lambda: torch.func.vmap(means)(x[None])[0] - x.mean((2, 3)),
        "grad": lambda: torch.func.grad(lambda x: means(x).sum())(x) - 1 / 20,
        "jvp": lambda: torch.func.jvp(means, (x,), (torch.ones_like(x),))[1] - 1,
    }
    for transformation, call in calls.items():
        if name == "auto":
            assert call().abs().max() < 1e-6, transformation
        else:
            with pytest.raises(RuntimeError, match="cannot run channel_mean: torch.func and forward-mode differentiation"):
                call()
    with torch.autograd.forward_ad.dual_level():
        assert backend.transformed()
    assert not backend.transformed()
