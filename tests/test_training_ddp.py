"""Two real processes, started by torchrun, over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from training_support import SPEC, same_state, tiny_dataset

from kdkernels.models import build_detector, load_detector
from kdkernels.training import TrainConfig, train

SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from training_support import SPEC, student, tiny_dataset
from test_training_distil import TEACHER, both
from kdkernels.training import TrainConfig, train

folder = Path(sys.argv[1])
data = tiny_dataset(folder / f"data{{__import__('os').environ['RANK']}}", 8)
model = student()
config = TrainConfig(steps=5, batch_size=2, warmup_steps=1, device="cpu", run_dir=str(folder / "run"), resume=sys.argv[2] == "resume")
stop = None
if sys.argv[2] == "stop":
    import os, signal
    # Ctrl-C reaches one process only; both have to stop after the same step.
    stop = lambda done, total: done == 2 and os.environ["RANK"] == "1" and os.kill(os.getpid(), signal.SIGINT)
from kdkernels.training import TrainingInterrupted
try:
    result = train(model, SPEC, data, data, config, student(1, TEACHER), both(), progress=stop)
except TrainingInterrupted:
    pass
rank = torch.distributed.get_rank()
torch.save({{"state": model.state_dict()}}, folder / f"{{sys.argv[2]}}-{{rank}}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def launch(folder: Path, what: str) -> list[dict[str, torch.Tensor]]:
    script = folder / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    root = Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), str(folder), what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{what}-{rank}.pt", weights_only=True)["state"] for rank in range(2)]


def trained(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters: the statistics of BatchNorm are those of a process's own images."""
    return {k: v for k, v in state.items() if "running" not in k and "num_batches" not in k}


def test_two_processes_agree_and_resume(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = launch(tmp_path / "a", "whole")
    assert same_state(trained(whole[0]), trained(whole[1])) == []
    folder = tmp_path / "a" / "run"
    saved, _, _ = load_detector(folder)
    assert same_state(trained(saved.state_dict()), trained(whole[0])) == []
    records = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(records) == 5 and len((folder / "train.log").read_text().splitlines()) == 3
    last = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    assert len(last["random"]) == 2 and last["distiller"]["trainable"]["adapter"]
    assert not any(name.startswith("module.") for name in last["model"])
    build_detector(SPEC).load_state_dict(last["model"])
    # The order of two processes with two images each is that of one process with four.
    data = tiny_dataset(tmp_path / "data", 8)
    alone = train(build_detector(SPEC), SPEC, data, None, TrainConfig(steps=5, batch_size=4, device="cpu"), console=False)
    assert alone.data_order == last["data_order"]

    launch(tmp_path / "b", "stop")
    assert torch.load(tmp_path / "b" / "run" / "checkpoints" / "last.pt", weights_only=True)["step"] == 3
    resumed = launch(tmp_path / "b", "resume")
    for rank in range(2):
        assert same_state(resumed[rank], whole[rank]) == []
