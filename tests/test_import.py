"""`import kdkernels` is light: torch and numpy only, and quick; the parts that drive detectors load at first use."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdkernels

ROOT = Path(kdkernels.__file__).parents[1]
HEAVY = ["torchvision", "PIL", "pycocotools", "accelerate", "typer", "rich", "yaml", "matplotlib", "jinja2", "triton"]


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_losses_work_where_nothing_but_torch_and_numpy_can_be_imported():
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ImportError(name + " is not here")
sys.meta_path.insert(0, Refuse())
import torch
import kdkernels
x = [torch.arange(24.0).view(1, 2, 3, 4).requires_grad_()]
y = [torch.ones(1, 2, 3, 4)]
value = kdkernels.BMFILoss()(x, y, [torch.tensor([[0.0, 0.0, 4.0, 4.0]])], (6, 8)) + kdkernels.GKDLoss()(x, x, y, y)
value.backward()
assert x[0].grad.abs().sum() > 0
kdkernels.backend_info()
from kdkernels import Distiller, FeatureTap, Teacher
print(sorted(m for m in {HEAVY!r} if m in sys.modules))
"""
    assert run(code) == "[]"


def test_import_takes_less_than_300_ms_of_processor_time_on_top_of_torch():
    code = "import time, torch, numpy; start = time.process_time(); import kdkernels; print(time.process_time() - start)"
    assert float(run(code, OMP_NUM_THREADS="1")) < 0.3


def test_import_leaves_torch_as_it_was():
    code = """
import torch
before = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
import kdkernels
after = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
print(torch.equal(before[0], after[0]) and before[1:] == after[1:])
"""
    assert run(code) == "True"


@pytest.mark.parametrize("name", kdkernels.__all__)
def test_every_public_name_resolves(name):
    value = getattr(kdkernels, name)
    assert name in dir(kdkernels)
    assert value.__name__.rpartition(".")[2] == name
    assert value.__doc__


def test_lazy_names_are_the_ones_of_their_modules():
    from kdkernels import Distiller, FeatureTap, Teacher
    from kdkernels.distiller import Distiller as distiller
    from kdkernels.tap import FeatureTap as tap
    from kdkernels.teacher import Teacher as teacher

    assert (Distiller, FeatureTap, Teacher) == (distiller, tap, teacher)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'GKDLos'"):
        _ = kdkernels.GKDLos
    with pytest.raises(ImportError):
        from kdkernels import GKDLos  # noqa: F401


def test_the_version_is_the_distribution_s():
    assert kdkernels.__version__ == importlib.metadata.version("kdkernels")


def test_functional_has_one_function_a_primitive_and_one_a_method():
    public = {name for name in kdkernels.functional.__all__ if callable(getattr(kdkernels.functional, name))}
    primitives = {path.stem for path in (ROOT / "kdkernels" / "reference").glob("*.py")} - {"__init__"}
    # The one launch does what other primitives do: they are its reference, and what is called.
    assert primitives == {path.stem for path in (ROOT / "kdkernels" / "ops").glob("*.py")} - {"__init__", "terms_persistent"}
    assert primitives | {"gkd", "bmfi", "aid", "fused"} <= public
    assert torch.is_tensor(kdkernels.functional.channel_mean([torch.ones(1, 2, 3, 4)])[0])
