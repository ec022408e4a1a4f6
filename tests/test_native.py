"""The compiled libraries: what is found, what is refused and why, and what stands behind the backend `native`."""

from __future__ import annotations

import json
import logging
import re
import subprocess
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from cli import kdkernels as command
from test_import import run
from toolchain import CXX, needs_compiler

import kdkernels
from kdkernels import backend, functional, native


@pytest.fixture(autouse=True)
def restore(monkeypatch):
    monkeypatch.setattr(backend, "_choice", "auto")
    monkeypatch.setattr(backend, "_fallbacks_told", set())
    monkeypatch.setattr(native, "_loaded", dict(native._loaded))


def garbage(folder: Path, kind: str = "cpu", **info: str) -> native.Library:
    """What comes of a file in `folder` that is no library, with the given build info beside it."""
    (folder / f"_C_{kind}.abi3.so").write_text("no library")
    if info:
        (folder / "_build_info.json").write_text(json.dumps(info))
    return native.load(kind, folder)


def test_the_library_that_was_built_serves():
    cpu = native.build_info().get("cpu", {"built": native.library().file is not None})
    assert cpu["built"] == kdkernels.backend_info()["native"]["available"]
    assert not cpu["built"] or native.version() in (None, kdkernels.__version__)


@pytest.mark.parametrize(("info", "why"), [("", ""), ("{}", ""), ('{"cpu": {"built": false, "reason": "no compiler"}}', ": no compiler")])
def test_without_a_file_the_reason_is_what_setup_wrote(tmp_path, info, why):
    (tmp_path / "_build_info.json").write_text(info)
    assert native.load("cpu", tmp_path) == (None, f"this installation of kdkernels has no compiled library _C_cpu{why}")


@pytest.mark.parametrize("text", ['{"version": ', "[]", ""])
def test_build_info_that_cannot_be_read_is_none(tmp_path, text):
    (tmp_path / "_build_info.json").write_text(text)
    assert native.build_info(tmp_path) == {}


@needs_compiler
def test_a_library_of_somebody_else_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "library.cpp").write_text("int nothing;\n")
    subprocess.run([CXX, "-shared", "-fPIC", "-o", tmp_path / "_C_cpu.abi3.so", tmp_path / "library.cpp"], check=True)
    monkeypatch.setattr(torch.ops, "kdkernels_native", torch._ops._OpNamespace("kdkernels_of_nobody"))
    assert native.load("cpu", tmp_path).reason == "_C_cpu.abi3.so: it has not the operators of kdkernels"


@pytest.mark.parametrize("suffix", EXTENSION_SUFFIXES)
def test_a_library_is_found_by_every_suffix_of_an_extension_module(tmp_path, suffix):
    (tmp_path / f"_C_cpu{suffix}").write_text("no library")
    assert native.load("cpu", tmp_path).file == tmp_path / f"_C_cpu{suffix}"


@needs_compiler
def test_a_library_with_an_undefined_symbol_names_it(tmp_path, monkeypatch):
    source = tmp_path / "library.cpp"
    source.write_text("int not_in_this_torch(void);\nint call(void) { return not_in_this_torch(); }\n")
    subprocess.run([CXX, "-shared", "-fPIC", "-o", tmp_path / "_C_cpu.abi3.so", source], check=True)
    monkeypatch.setattr(torch.ops, "kdkernels_native", torch._ops._OpNamespace("kdkernels_of_nobody"))
    reason = native.load("cpu", tmp_path).reason
    assert reason.startswith("_C_cpu.abi3.so: ") and "not_in_this_torch" in reason
    assert str(tmp_path) not in reason and "\n" not in reason


def test_a_file_that_is_no_library_says_what_the_loader_says(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.ops, "kdkernels_native", torch._ops._OpNamespace("kdkernels_of_nobody"))
    file, reason = garbage(tmp_path)
    assert file == tmp_path / "_C_cpu.abi3.so"
    assert re.fullmatch(r"_C_cpu\.abi3\.so: .+", reason)


def test_a_library_of_another_version_names_both(tmp_path):
    reason = garbage(tmp_path, version="0.0.9").reason
    assert reason == f"_C_cpu.abi3.so: it was built for kdkernels 0.0.9, this is {kdkernels.__version__}"


@pytest.mark.parametrize(
    ("version", "older"), [("2.9.1+cu128", True), ("2.10.0", True), ("2.11.0a0+git1", False), ("2.100.0", False), ("3.0", False)]
)
def test_torch_is_compared_by_its_release_numbers(tmp_path, monkeypatch, version, older):
    monkeypatch.setattr(torch, "__version__", version)
    reason = garbage(tmp_path, version=kdkernels.__version__, target="2.11").reason
    assert (reason == f"_C_cpu.abi3.so: it needs torch 2.11 or newer, this is {version}") == older


def test_the_library_for_cuda_waits_for_a_gpu_and_for_the_other_library(tmp_path):
    native._loaded["cpu"] = native.Library(tmp_path, "")
    assert torch.cuda.is_available() or garbage(tmp_path, "cuda").reason == "_C_cuda.abi3.so: there is no CUDA device"
    native._loaded["cpu"] = native.Library(tmp_path, "it is too old")
    assert garbage(tmp_path, "cuda").reason == "_C_cuda.abi3.so: it needs the library for the CPU, which does not serve"


def test_auto_tells_of_a_library_that_does_not_fit_once_and_goes_on(tmp_path, caplog):
    native._loaded["cpu"] = garbage(tmp_path, version="0.0.9")
    with caplog.at_level(logging.WARNING, logger="kdkernels"):
        for _ in range(3):
            means = functional.channel_mean([torch.ones(1, 1, 1, 1)])
    assert means[0].item() == 1
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        f"using 'reference' for channel_mean, not 'native': {native.library().reason}"
    ]


def test_a_library_that_does_not_fit_raises_where_native_is_named(tmp_path, monkeypatch):
    native._loaded["cpu"] = garbage(tmp_path, version="0.0.9")
    with pytest.raises(RuntimeError, match="'native' cannot run: .* built for kdkernels 0.0.9"):
        kdkernels.set_backend("native")
    monkeypatch.setattr(backend, "_choice", "native")
    with pytest.raises(RuntimeError, match="'native' cannot run channel_mean: .* built for kdkernels 0.0.9"):
        functional.channel_mean([torch.ones(1, 1, 1, 1)])
    info = kdkernels.backend_info()["native"]
    assert not info["available"] and not info["active"] and info["reason"] == native.library().reason


@pytest.mark.parametrize("fits", [pytest.param(True, marks=needs_compiler), False])
def test_the_choice_is_traced_with_and_without_a_library(tmp_path, fits):
    if not fits:
        native._loaded["cpu"] = garbage(tmp_path, version="0.0.9")
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: 2 * functional.channel_mean([x])[0], backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    means = compiled(x)
    means.sum().backward()
    torch.testing.assert_close(means, 2 * x.mean((2, 3)))
    torch.testing.assert_close(x.grad, torch.full_like(x, 0.1))
    assert backend.resolve("channel_mean", [x], [x], "signed") is offered("native" if fits else "reference")


def offered(name: str):
    return backend._implementations[name]["channel_mean"].function


@needs_compiler
def test_native_says_what_it_cannot_do_and_auto_takes_the_reference_for_it():
    doubles = [torch.ones(1, 1, 1, 1, dtype=torch.float64)]
    elsewhere = [torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1, device="meta")]
    for x, reason in ((doubles, "float64"), (elsewhere, "several devices"), (elsewhere[1:], "the tensors are on meta, not on the CPU")):
        kdkernels.set_backend("native")
        with pytest.raises(RuntimeError, match=f"'native' cannot run channel_mean: .*{reason}"):
            backend.resolve("channel_mean", x, x, "signed")
        kdkernels.set_backend("auto")
        assert backend.resolve("channel_mean", x, x, "signed") is offered("reference")
    kdkernels.set_backend("native")
    with pytest.raises(RuntimeError, match="a weight per element is in the reference only"):
        functional.weighted_channel_sum([torch.ones(1, 1, 2, 2)], [torch.ones(1, 1, 2, 2)])
    assert functional.channel_mean([]) == []


@needs_compiler
def test_every_operator_has_the_same_schema_in_the_library():
    names = torch._C._dispatch_get_all_op_names()
    operators = {name.partition("::")[2] for name in names if name.startswith("kdkernels::")}
    compiled = {name.partition("::")[2] for name in names if name.startswith("kdkernels_native::")}
    assert operators == compiled - {"cpu_capability", "set_cpu_capability"}
    for name in operators:
        ours, theirs = (str(getattr(library, name).default._schema) for library in (torch.ops.kdkernels, torch.ops.kdkernels_native))
        # The stable ABI has no symbolic integers.
        wanted = ours.replace(f"kdkernels::{name}(str backend, ", f"kdkernels_native::{name}(").replace("SymInt", "int")
        assert theirs == wanted


@needs_compiler
@pytest.mark.parametrize("name", ["channel_mean", "of_tomorrow"])
def test_a_library_of_other_sources_is_put_out_of_use(name):
    native.expect("channel_mean", "(Tensor[] x, bool absolute) -> Tensor")
    assert native.library().reason == ""
    native.expect(name, "(Tensor[] x, SymInt pixels) -> Tensor")
    assert f"built from other sources, its operator {name} is missing or another" in native.library().reason
    native.expect("attention", "() -> ()")
    assert name in native.library().reason


@needs_compiler
@pytest.mark.parametrize("instructions", ["scalar", "sse9"])
def test_the_environment_chooses_the_instructions(instructions):
    code = """
import torch, kdkernels
print(kdkernels.functional.channel_mean([torch.ones(1, 1, 1, 1)]))
print(kdkernels.backend_info()["native"]["reason"] or kdkernels.native.capability())
"""
    means, told = run(code, KDKERNELS_CPU_CAPABILITY=instructions).splitlines()
    assert "1." in means
    assert re.search("^scalar$|KDKERNELS_CPU_CAPABILITY: unknown .*sse9.* scalar, avx2 and avx512", told)
    assert instructions in told


@needs_compiler
def test_the_environment_can_name_native():
    code = """
import torch, kdkernels
x = torch.ones(1, 2, 3, 4, requires_grad=True)
kdkernels.functional.channel_mean([x])[0].sum().backward()
print([name for name, info in kdkernels.backend_info().items() if info["active"]], float(x.grad.sum()))
"""
    assert run(code, KDKERNELS_BACKEND="native") == "['native'] 2.0"


def test_info_tells_where_the_libraries_are_or_why_not(tmp_path):
    told = " ".join(command("info").stdout.split())
    file, reason = native.library()
    assert f"cpu: {reason or f'{file}, for {native.capability()} instructions'}" in told
    native._loaded["cpu"] = garbage(tmp_path, version="0.0.9")
    assert f"cpu: {native.library().reason}" in " ".join(command("info").stdout.split())
