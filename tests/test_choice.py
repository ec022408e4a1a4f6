"""Which backend `auto` takes on a GPU that need not be there: the table's, and why."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from choice_support import HOPPER, KEY, PRIMITIVES, forget, level, table, taken, two_backends
from torch import Tensor

import kdkernels
from benchmarks.cli import main
from kdkernels import backend, choice, native
from kdkernels.tables import DTYPES, LAYOUTS, Key, sizes


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with two_backends(tmp_path, monkeypatch):
        yield tmp_path


ONE_LAUNCH = "terms_persistent bf16 contiguous small"


# The table


def test_the_faster_one_is_taken_and_triton_where_nothing_was_measured(folder: Path) -> None:
    (folder / "sm_90.json").write_text(table({KEY: (2.0, 1.0), "channel_mean fp16 contiguous small": (1.0, 2.0)}))
    assert taken(level()) == "native"
    others = [level("medium"), level("large"), level(dtype=torch.float16), level(dtype=torch.float32), level(layout="channels_last")]
    assert [taken(x) for x in others] == ["triton"] * 5
    assert choice.order("attention", [level()]) == ("triton", "native")


def test_equal_times_leave_triton(folder: Path) -> None:
    (folder / "sm_90.json").write_text(table({KEY: (1.0, 1.0)}))
    assert taken(level()) == "triton"


def test_without_a_table_sizes_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "key_of", lambda *_: pytest.fail("asked"))
    assert choice.order("channel_mean", [level()]) == choice.BACKENDS


def test_another_chips_table_is_never_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "sm_80.json").write_text(table({KEY: (2.0, 1.0)}, (8, 0)))
    assert taken(level()) == "triton"
    forget()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert taken(level()) == "native"
    forget()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert taken(level()) == "triton"


def test_nothing_is_read_or_asked_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "sm_90.json").write_text(table({KEY: (2.0, 1.0)}))
    assert taken(level()) == "native"
    (folder / "sm_90.json").write_text("[]")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: pytest.fail("asked"))
    assert taken(level()) == "native" and taken(level("large")) == "triton"


def test_the_first_tensor_gives_type_and_layout_and_all_give_the_size() -> None:
    first, second = level("medium", torch.float16, "channels_last"), level("large")
    assert choice.key_of("terms", [first, second]) == Key("terms", "fp16", "channels_last", "large")
    assert choice.key_of("terms", [first]) == Key("terms", "fp16", "channels_last", "medium")
    assert choice.key_of("map_distance", [level(shape=(2, 3, 4))]) == Key("map_distance", "bf16", "contiguous", "small")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ([], "ms of triton and native"),
        ({"ms": {"triton": 1.0}}, "ms of triton and native"),
        ({"ms": {"triton": 1.0, "native": 1.0, "reference": 1.0}}, "ms of triton and native"),
        ({"ms": {"triton": 1.0, "native": 0}}, "numbers above 0"),
        ({"ms": {"triton": 1.0, "native": True}}, "numbers above 0"),
        ({"ms": {"triton": float("nan"), "native": 1.0}}, "numbers above 0"),
        ({"ms": {"triton": "1", "native": 1.0}}, "numbers above 0"),
        *(({"ms": dict.fromkeys(choice.BACKENDS, 1.0), **run}, "run must be a place in runs") for run in ({}, {"run": 1}, {"run": True})),
    ],
)
def test_a_wrong_entry_is_an_error_with_file_and_key(folder: Path, entry: Any, said: str) -> None:
    """Also where this call would not have used it."""
    whole = {"schema": 1, "capability": [9, 0], "runs": [{}], "entries": {"terms fp32 contiguous large": entry}}
    (folder / "sm_90.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="sm_90.json: terms fp32 contiguous large: ") as caught:
        taken(level())
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no JSON"),
        ('{"schema": 2}', "no table of times of backends with schema 1"),
        (table({"channel_mean fp64 contiguous small": (1.0, 2.0)}), "dtype must be one of"),
        (table({"mean fp32 contiguous small": (1.0, 2.0)}), "mean fp32 contiguous small: name must be one of attention, "),
        (table({KEY: (1.0, 2.0)}, (8, 0)), "of compute capability 8.0"),
    ],
)
def test_a_malformed_file_is_an_error(folder: Path, text: str, said: str) -> None:
    (folder / "sm_90.json").write_text(text)
    with pytest.raises(ValueError, match="sm_90.json: ") as caught:
        taken(level())
    assert said in str(caught.value)


def slower_choices(file: Path) -> list[str]:
    """Entries for which `auto` takes another backend than the one that this table calls the fastest, or an equally fast one."""
    found = []
    for name, entry in choice.TABLE.read(file)["entries"].items():
        key = Key(*name.split(" "))
        (dtype,) = (dtype for dtype, text in DTYPES.items() if text == key.dtype)
        first, *_ = choice.order(key.name, [level(key.size, dtype, key.layout)])
        if entry["ms"][first] > min(entry["ms"].values()):
            found.append(name)
    return found


def test_auto_never_takes_a_slower_backend_than_a_table_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a table of every kind of call, and on all that this package has: each is sound, of its file's name, and about fused primitives."""
    keys = [" ".join((name, *words)) for name in PRIMITIVES for words in product(DTYPES.values(), LAYOUTS, sizes(name))]
    made = table({name: (1 + 7 * number % 11, 1 + 5 * number % 13) for number, name in enumerate(keys)})
    (folder / "sm_90.json").write_text(made)
    # Three sizes, but twelve of the one launch.
    assert len(keys) == (len(PRIMITIVES) - 1) * 18 + 72 and slower_choices(folder / "sm_90.json") == []
    assert {choice.order(key.name, [level()])[0] for key in choice.times(HOPPER)} == set(choice.BACKENDS)
    own = Path(choice.__file__).with_name("choices")
    monkeypatch.setattr(choice, "TABLES", own)
    for file in own.glob("*"):
        found = choice.TABLE.read(file)
        forget()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, chip=tuple(found["capability"]): chip)
        assert file == choice.path(tuple(found["capability"])) and slower_choices(file) == []
        assert {name.split(" ")[0] for name in found["entries"]} <= set(PRIMITIVES)
        assert all(0 <= entry["run"] < len(found["runs"]) for entry in found["entries"].values())


# What can serve


def test_where_the_chosen_one_refuses_a_call_the_other_serves_it(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    huge = level(dtype=torch.float32, shape=(1, 1, 1 << 12, 1 << 12))
    with caplog.at_level(logging.INFO, logger="kdkernels"):
        assert taken(huge) == "native" and taken(huge) == "native"
    assert [record.levelno for record in caplog.records] == [logging.INFO]
    assert "backend auto: using 'native' for channel_mean, not 'triton': it takes maps of fewer than 16777216 pixels" in caplog.text


def test_distributions_of_more_bins_than_triton_takes_are_native(caplog: pytest.LogCaptureFixture) -> None:
    wide, weight = [level(shape=(1, 4100, 2, 2)), level(shape=(1, 4, 2, 2))], None
    with caplog.at_level(logging.INFO, logger="kdkernels"):
        assert [taken(wide[0], "logit_kl", wide, wide, weight, 1.0, groups) for groups in (1, 2)] == ["native", "triton"]
        assert taken(wide[0], "logit_bce", wide, wide, weight, 1.0) == "triton"
    said = "not 'triton': it takes distributions of at most 4096 bins, got 4100"
    assert [record.getMessage() for record in caplog.records] == [f"backend auto: using 'native' for logit_kl, {said}"]
    assert backend.refusal("triton", "logit_kl", wide, (wide, wide, weight, 1.0, 1)) == said.removeprefix("not 'triton': ")


def test_what_is_fallen_back_to_is_said_once_of_each_backend(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = level(dtype=torch.float32, shape=(1, 1, 1 << 12, 1 << 12))
    wide = level(dtype=torch.float64)
    with caplog.at_level(logging.INFO, logger="kdkernels"):
        assert [taken(x) for x in (huge, wide, huge, wide)] == ["native", "reference", "native", "reference"]
    assert [record.getMessage().partition(" for ")[0] for record in caplog.records] == [
        "backend auto: using 'native'",
        "backend auto: using 'reference'",
    ]
    # Where nothing was refused there is nothing to look up.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: pytest.fail("asked"))
    backend._tell_fallback("channel_mean", "triton", {})


def test_where_both_refuse_a_call_the_reference_serves_it_and_both_reasons_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="kdkernels"):
        assert taken(level(dtype=torch.float64)) == "reference"
    assert "using 'reference' for channel_mean, not 'triton': it does not take float64, not 'native': it does not take" in caplog.text


def test_without_triton_native_serves_and_without_a_library_triton_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "sm_90.json").write_text(table({KEY: (2.0, 1.0)}))
    with caplog.at_level(logging.INFO, logger="kdkernels"):
        monkeypatch.setattr(backend, "_TRITON_INSTALLED", False)
        assert taken(level("large")) == "native"
        monkeypatch.setattr(backend, "_TRITON_INSTALLED", True)
        monkeypatch.setattr(backend, "_fallbacks_told", set())
        monkeypatch.setitem(native._loaded, "cuda", native.Library(None, "it was not built"))
        assert taken(level()) == "triton"
        monkeypatch.setattr(backend, "_fallbacks_told", set())
        monkeypatch.setitem(native._loaded, "cuda", native.Library(folder / "_C_cuda.so", "_C_cuda.so: it is too old"))
        assert taken(level()) == "triton"
    told = [(record.levelno, record.getMessage().partition("using ")[2]) for record in caplog.records]
    assert told == [
        (logging.INFO, "'native' for channel_mean, not 'triton': triton is not installed"),
        (logging.INFO, "'triton' for channel_mean, not 'native': it was not built"),
        (logging.WARNING, "'triton' for channel_mean, not 'native': _C_cuda.so: it is too old"),
    ]


def test_a_named_backend_is_taken_whatever_was_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "sm_90.json").write_text(table({KEY: (2.0, 1.0)}))
    monkeypatch.setattr(backend, "_choice", "triton")
    assert taken(level()) == "triton"
    monkeypatch.setattr(backend, "_choice", "native")
    assert taken(level()) == "native"
    monkeypatch.setitem(native._loaded, "cuda", native.Library(None, "it was not built"))
    with pytest.raises(RuntimeError, match="backend 'native' cannot run channel_mean: it was not built"):
        taken(level())


def test_an_assigned_backend_is_the_only_one_that_auto_has(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "sm_90.json").write_text(table({KEY: (2.0, 1.0)}))
    with backend.assigned("channel_mean", "triton"):
        assert taken(level()) == "triton"
        assert taken(level(), "attention", [level()], 0.5) == "triton"
        with pytest.raises(RuntimeError, match="'triton' cannot run channel_mean: it does not take float64"):
            taken(level(dtype=torch.float64))
        monkeypatch.setattr(backend, "_choice", "reference")
        assert taken(level()) == "reference"
        monkeypatch.setattr(backend, "_choice", "auto")
    assert taken(level()) == "native"


def test_only_what_there_is_can_be_assigned() -> None:
    for primitive, name, said in (("channel_means", "native", "primitive 'channel_means'"), ("terms", "auto", "backend 'auto'")):
        with pytest.raises(ValueError, match=f"unknown {said}; they are "), backend.assigned(primitive, name):
            pass
    assert backend._assigned == {}


# One launch for what other primitives do as well


def preferred(x: Tensor) -> bool:
    return backend.prefers("native", "terms_persistent", [x])


@pytest.mark.parametrize(("ms", "said"), [((2.0, 1.0), True), ((1.0, 2.0), False), ((1.0, 1.0), False)])
def test_one_launch_is_preferred_where_it_was_faster(folder: Path, ms: tuple[float, float], said: bool) -> None:
    (folder / "sm_90.json").write_text(table({ONE_LAUNCH: ms}))
    assert preferred(level()) is said
    others = [level("large"), level(dtype=torch.float32), level(layout="channels_last"), level(dtype=torch.float64), torch.ones(1, 1, 2, 2)]
    assert not any(preferred(x) for x in others)


@pytest.mark.parametrize(("name", "said"), [("auto", True), ("native", True), ("triton", False), ("reference", False)])
def test_one_launch_is_the_native_backends(folder: Path, name: str, said: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_choice", name)
    assert not preferred(level())
    forget()
    (folder / "sm_90.json").write_text(table({ONE_LAUNCH: (2.0, 1.0)}))
    assert preferred(level()) is said


def test_one_launch_is_what_is_assigned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not preferred(level())
    with backend.assigned("terms_persistent", "native"):
        assert preferred(level()) and preferred(level(dtype=torch.float32))
        monkeypatch.setattr(backend, "_choice", "reference")
        assert not preferred(level())
        monkeypatch.setattr(backend, "_choice", "auto")
    forget()
    (folder / "sm_90.json").write_text(table({ONE_LAUNCH: (2.0, 1.0)}))
    for name in ("triton", "reference"):
        with backend.assigned("terms_persistent", name):
            assert not preferred(level())
    assert preferred(level())


# The library for CUDA


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kinds of libraries that are loaded from now on."""
    asked: list[str] = []

    def load(kind: str) -> native.Library:
        asked.append(kind)
        return native.Library(None, "it was not built")

    monkeypatch.setattr(native, "load", load)
    monkeypatch.setattr(native, "_loaded", {"cpu": native._loaded["cpu"]})
    return asked


def test_the_library_for_cuda_is_loaded_once_and_only_for_tensors_on_a_gpu(unasked: list[str]) -> None:
    taken(torch.ones(1, 1, 2, 2))
    assert taken(level()) == "triton" and unasked == []
    assert taken(level(dtype=torch.float64)) == taken(level(dtype=torch.float64)) == "reference"
    assert unasked == ["cuda"]


def test_what_puts_the_operators_out_of_use_does_so_on_cuda_too(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(native, "_loaded", {kind: native.Library(folder / kind, "") for kind in native.KINDS})
    native.expect("of_tomorrow", "(Tensor x) -> Tensor")
    assert "built from other sources, its operator of_tomorrow" in native.library("cpu").reason and "cuda" not in native._loaded


def test_a_library_for_cuda_must_have_what_the_other_has(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    there = {("kdkernels_native::terms", "CPU"), ("kdkernels_native::attention", "CPU"), ("kdkernels_native::attention", "CUDA")}
    there.add(("kdkernels_native::cpu_capability", "CompositeExplicitAutograd"))
    # The one launch has kernels for nothing else.
    known = ["aten::add", *(f"kdkernels_native::{name}" for name in ("terms", "attention", "cpu_capability", "terms_persistent"))]
    monkeypatch.setattr(torch._C, "_dispatch_get_all_op_names", lambda: known)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *asked: asked in there)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(native, "_open", lambda file: "")
    monkeypatch.setitem(native._loaded, "cpu", native.Library(folder, ""))
    (folder / "_C_cuda.abi3.so").touch()
    assert native.load("cuda", folder).reason == "_C_cuda.abi3.so: it was built from other sources and has no terms, terms_persistent"
    there.add(("kdkernels_native::terms", "CUDA"))
    assert native.load("cuda", folder).reason.endswith("and has no terms_persistent")
    there.add(("kdkernels_native::terms_persistent", "CUDA"))
    assert native.load("cuda", folder).reason == ""


# torch.compile


@pytest.mark.parametrize(("architecture", "backends"), [("9.0", ["native", "triton"]), ("8.0", ["triton", "triton"])])
def test_torch_compile_traces_the_choice(
    folder: Path, monkeypatch: pytest.MonkeyPatch, unasked: list[str], architecture: str, backends: list[str]
) -> None:
    """On a CPU that is taken for a GPU: as one graph, the table read and the library asked for, and what it has, while it is traced."""
    (folder / "_build_info.json").write_text(json.dumps({"cuda": {"architectures": [architecture]}}))
    if native.library("cpu").reason:
        monkeypatch.setitem(native._loaded, "cpu", native.Library(folder, ""))
    entries = {f"channel_mean fp32 contiguous {size}": ms for size, ms in (("small", (2.0, 1.0)), ("medium", (1.0, 2.0)))}
    (folder / "sm_90.json").write_text(table(entries))
    monkeypatch.setattr(native, "load", lambda kind: unasked.append(kind) or native.Library(folder / "_C_cuda.so", ""))
    monkeypatch.setattr(backend, "_order", choice.order)
    monkeypatch.setattr(backend, "_refuses_device", lambda name, device: native.refuses("cuda", 0) if name == "native" else "")
    used: list[str] = []

    def compiler(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        used.extend(node.args[0] for node in graph.graph.nodes if "channel_mean" in str(node.target))
        return lambda *given: (torch.zeros(2),)

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: kdkernels.functional.channel_mean([x])[0] + 1, backend=compiler, fullgraph=True, dynamic=True)
    for width in (7, 16, 1 << 17):
        compiled(torch.empty(2, 3, 5, width))
    torch._dynamo.reset()
    assert used == backends and unasked == ["cuda"]


@pytest.mark.gpu
def test_a_table_is_measured_on_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    forget()
    output = folder / "table.json"
    words = ["choose", "--primitive", "channel_mean", "--case", "tiny", "--dtype", "bf16", "--layout", "contiguous", "--rounds", "8"]
    there = main([*words, "--output", str(output)])
    assert there == (2 if native.library("cuda").reason else 0)
    found = choice.TABLE.read(output)["entries"] if there == 0 else {KEY: {"ms": {"triton": 1}}}
    assert list(found) == [KEY] and all(0 < ms < 100 for ms in found[KEY]["ms"].values())
