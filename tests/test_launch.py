"""Launch parameters: whose table is read, which entry, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.tune.candidates import PARAMETERS
from kdkernels.triton import launch

HOPPER = (9, 0)
USUAL = {"BLOCK": 128, "num_warps": 4}
CHOSEN = {"BLOCK": 512, "num_warps": 8, "num_stages": 2}
KEY = "reduce bf16 contiguous large"


def heuristic(dtype: torch.dtype, last: bool) -> dict[str, int]:
    return dict(USUAL)


def levels(elements: int = 1 << 26, dtype: torch.dtype = torch.bfloat16, device: int | None = 0) -> Any:
    """Two levels as a launch sees them, on a GPU that need not be there."""
    one = SimpleNamespace(dtype=dtype, is_cuda=device is not None, device=SimpleNamespace(index=device), numel=lambda: elements // 2)
    return [one, one]


def forget() -> None:
    launch._CHECKED.clear()
    launch._table.cache_clear()
    launch.capability.cache_clear()


@pytest.fixture(autouse=True)
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of tables, and a GPU of compute capability 9.0."""
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    forget()
    yield tmp_path
    forget()


def table(entries: dict[str, Any], capability: tuple[int, int] = HOPPER) -> str:
    whole = {name: {"parameters": chosen, "run": 0} for name, chosen in entries.items()}
    return json.dumps({"schema": launch.SCHEMA, "capability": capability, "runs": [{}], "entries": whole})


def asked(**about: Any) -> dict[str, int]:
    """The heuristic is another object each time, as one that is made from the shapes is."""
    return launch.parameters("reduce", partial(heuristic), levels(**about), False)


def test_the_entry_of_exactly_this_launch_counts(tables: Path) -> None:
    (tables / "sm_90.json").write_text(table({KEY: CHOSEN}))
    assert asked() == CHOSEN
    other = [asked(elements=1 << 24), asked(dtype=torch.float16), asked(dtype=torch.float64), asked(device=None)]
    other += [launch.parameters("reduce", heuristic, levels(), True), launch.parameters("gradient", heuristic, levels(), False)]
    assert other == [USUAL] * len(other)


def test_another_chips_table_is_never_used(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tables / "sm_80.json").write_text(table({KEY: CHOSEN}, (8, 0)))
    (tables / "sm_100.json").write_text(table({KEY: CHOSEN}, (10, 0)))
    assert asked() == USUAL
    forget()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert asked() == CHOSEN
    forget()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert asked() == USUAL


def test_a_null_entry_is_the_heuristic_whatever_it_says_today(tables: Path) -> None:
    (tables / "sm_90.json").write_text(table({KEY: None}))
    assert asked() == USUAL


@pytest.mark.parametrize(
    ("elements", "size"),
    [(0, "small"), ((1 << 21) - 2, "small"), (1 << 21, "medium"), ((1 << 25) - 2, "medium"), (1 << 25, "large"), (1 << 40, "large")],
)
def test_sizes_are_those_of_all_levels_together(elements: int, size: str) -> None:
    assert launch.size_of(levels(elements)) == size


def test_nothing_is_read_or_asked_twice(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tables / "sm_90.json").write_text(table({KEY: CHOSEN}))
    assert asked() == CHOSEN

    def never(*_: object) -> Any:
        raise AssertionError

    monkeypatch.setattr(launch, "read", never)
    monkeypatch.setattr(torch.cuda, "get_device_capability", never)
    (tables / "sm_90.json").unlink()
    given = asked()
    given["BLOCK"] = 1
    assert asked() == CHOSEN and asked(elements=1 << 27) == CHOSEN and asked(elements=8) == USUAL


@pytest.mark.parametrize(
    ("key", "chosen", "said"),
    [
        (KEY, {"BLOCKS": 512, "num_warps": 8}, "unknown parameters BLOCKS"),
        (KEY, {"num_warps": 8}, "missing parameters BLOCK;"),
        (KEY, {**CHOSEN, "BLOCK": 0}, "whole numbers of 1 or more"),
        (KEY, {**CHOSEN, "BLOCK": 64.0}, "whole numbers of 1 or more"),
        (KEY, {**CHOSEN, "BLOCK": True}, "whole numbers of 1 or more"),
        (KEY, [512], "whole numbers of 1 or more"),
        (KEY, {**CHOSEN, "num_warps": 6}, "num_warps must be a power of 2"),
        ("reduce bf16 large", CHOSEN, "expected a key of name, dtype, layout, size"),
        ("reduce fp64 contiguous large", CHOSEN, "dtype must be one of fp32, fp16, bf16; got 'fp64'"),
        ("reduce fp32 NHWC large", CHOSEN, "layout must be one of contiguous, channels_last; got 'NHWC'"),
        ("reduce fp32 contiguous huge", CHOSEN, "size must be one of small, medium, large; got 'huge'"),
    ],
)
def test_a_wrong_entry_is_an_error_with_file_and_key(tables: Path, key: str, chosen: Any, said: str) -> None:
    """Also where this launch would not have used it."""
    (tables / "sm_90.json").write_text(table({"reduce fp32 channels_last small": USUAL, key: chosen}))
    with pytest.raises(ValueError, match="sm_90.json") as caught:
        asked(elements=8)
    assert key in str(caught.value) and said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no JSON"),
        ("[]", "schema 1"),
        ('{"schema": 2}', "schema 1"),
        ('{"schema": 1, "runs": [], "entries": {}}', "capability"),
        ('{"schema": 1, "capability": [9, 0], "runs": [], "entries": []}', "entries must be"),
        (table({KEY: CHOSEN}).replace("parameters", "parameter"), f"{KEY}: expected an object"),
        (table({KEY: CHOSEN}).replace('"run": 0', '"run": 1'), f"{KEY}: run must be a place in runs, of which there are 1; got 1"),
        (table({KEY: CHOSEN}, (8, 0)), "of compute capability 8.0"),
    ],
)
def test_a_malformed_file_is_an_error(tables: Path, text: str, said: str) -> None:
    (tables / "sm_90.json").write_text(text)
    with pytest.raises(ValueError, match="sm_90.json: ") as caught:
        asked()
    assert said in str(caught.value)


def test_an_override_beats_table_and_heuristic_and_ends(tables: Path) -> None:
    (tables / "sm_90.json").write_text(table({KEY: CHOSEN}))
    with launch.override("reduce", {}) as used:
        assert asked() == USUAL and used == USUAL
    with launch.override("reduce", {"BLOCK": 64, "num_stages": 3}) as used:
        assert asked() == used == {"BLOCK": 64, "num_warps": 4, "num_stages": 3}
        assert launch.parameters("gradient", heuristic, levels(), False) == USUAL
    assert asked() == CHOSEN


def test_an_override_with_an_unknown_parameter_is_an_error() -> None:
    with launch.override("reduce", {"BLOK": 64}), pytest.raises(ValueError, match="reduce has no parameters BLOK; it has BLOCK") as caught:
        asked()
    assert "num_warps" in str(caught.value) and asked() == USUAL


def test_the_tables_of_this_package_are_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were measured and committed: each is read, is that of its file name, and is about kernels that are tuned."""
    folder = Path(launch.__file__).with_name("tables")
    monkeypatch.setattr(launch, "TABLES", folder)
    read: dict[Path, Any] = {file: launch.read(file) for file in folder.glob("*")}
    assert all(file == launch.path(tuple(found["capability"])) for file, found in read.items())
    assert all(name.split(" ")[0] in PARAMETERS for found in read.values() for name in found["entries"])
