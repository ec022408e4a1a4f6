"""The parts of training on their own: schedules, data order, average of weights, inheriting, checkpoints."""

from __future__ import annotations

import hashlib
import io
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from training_support import SPEC, same_state, student, tiny_dataset

from kdkernels.data import Augment, sample_seed
from kdkernels.models import DetectorSpec
from kdkernels.training import Ema, TrainConfig, checkpoint, init_student
from kdkernels.training.feed import Feed
from kdkernels.training.initialise import body, freeze_batchnorm, state_hash
from kdkernels.training.interrupt import Interrupt
from kdkernels.training.logbook import Logbook
from kdkernels.training.optimizer import kd_factor, make_optimizer, rate_factor, set_rate


def test_cosine_with_warmup() -> None:
    config = TrainConfig(warmup_steps=30)
    factors = [rate_factor(config, step, 300) for step in range(300)]
    assert factors[0] == 1 / 30 and factors[29] == 1 == factors[30]
    assert factors[-1] == pytest.approx(0.01)
    middle = (30 + 299) / 2
    assert (factors[int(middle)] + factors[int(middle) + 1]) / 2 == pytest.approx(0.505)
    assert all(a >= b for a, b in zip(factors[30:], factors[31:], strict=False))


def test_step_schedule_drops_at_8_and_11_twelfths() -> None:
    config = TrainConfig(optimizer="sgd", warmup_steps=10)
    factors = [rate_factor(config, step, 120) for step in range(120)]
    assert factors[10:80] == [1.0] * 70
    assert factors[80:110] == pytest.approx([0.1] * 30)
    assert factors[110:] == pytest.approx([0.01] * 10)


def test_short_runs_warm_up_for_at_most_half() -> None:
    assert rate_factor(TrainConfig(warmup_steps=30), 2, 6) == 1.0
    assert rate_factor(TrainConfig(warmup_steps=30), 0, 1) == 1.0


def test_the_optimiser_gets_the_rate_of_the_step() -> None:
    config = TrainConfig(warmup_steps=4, learning_rate=0.5)
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = make_optimizer(config, [weight, torch.nn.Parameter(torch.zeros(1), requires_grad=False)])
    assert optimizer.param_groups[0]["params"] == [weight]
    assert [set_rate(config, optimizer, step, 10) for step in range(5)] == [0.125, 0.25, 0.375, 0.5, 0.5]
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(("kind", "end", "middle"), [("constant", 1.0, 1.0), ("linear", 0.0, 0.5), ("cosine", 0.0, 0.5)])
def test_weight_of_the_distillation(kind: str, end: float, middle: float) -> None:
    config = TrainConfig(kd_schedule=kind, kd_warmup_steps=4)
    factors = [kd_factor(config, s, 25) for s in range(25)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[14] == pytest.approx(middle) and factors[24] == pytest.approx(end)


def test_sgd_has_momentum() -> None:
    optimizer = make_optimizer(TrainConfig(optimizer="sgd"), [torch.nn.Parameter(torch.zeros(1))])
    group = optimizer.param_groups[0]
    assert (group["momentum"], group["weight_decay"], group["lr"]) == (0.9, 1e-4, 1e-2)


def test_order_depends_on_seed_and_epoch_only(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path, 9)
    feed = Feed(data, 2, seed=3)
    assert feed.steps_per_epoch == 4 and len(set(feed.order(0))) == 8
    assert feed.order(0) == Feed(data, 2, seed=3).order(0)
    assert feed.order(0) != feed.order(1) and feed.order(0) != Feed(data, 2, seed=4).order(0)
    assert feed.samples(1, 2) == [(i, sample_seed(3, 1, i)) for i in feed.order(1)[4:6]]
    ids = [[t["image_id"] for t in batch[1]] for step in feed.steps(0) for batch in step]
    assert ids == [[data.items[i].image_id for i, _ in feed.samples(0, s)] for s in range(4)]
    later = [[t["image_id"] for t in batch[1]] for step in feed.steps(0, first=3) for batch in step]
    assert later == ids[3:]


def test_small_data_set_is_repeated(tmp_path: Path) -> None:
    feed = Feed(tiny_dataset(tmp_path, 3), 8, seed=0)
    assert feed.steps_per_epoch == 1 and len(feed.order(0)) == 8 and set(feed.order(0)) == {0, 1, 2}


def test_processes_and_accumulation_share_one_order(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path, 8)
    whole = [t["image_id"] for step in Feed(data, 8, seed=1).steps(0) for batch in step for t in batch[1]]
    parts: list[list[int]] = []
    for rank in range(2):
        feed = Feed(data, 2, seed=1, accumulation=2, rank=rank, processes=2)
        (step,) = feed.steps(0)
        parts += [[t["image_id"] for t in batch[1]] for batch in step]
    assert parts[0] + parts[2] + parts[1] + parts[3] == whole


def test_augmentation_comes_from_the_seed_with_any_number_of_workers(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path, 4).with_transform(Augment())
    state = torch.get_rng_state()
    plain = [batch for step in Feed(data, 2, seed=5).steps(0) for batch in step]
    assert torch.equal(state, torch.get_rng_state())
    working = [batch for step in Feed(data, 2, seed=5, workers=1).steps(0) for batch in step]
    for (images, targets), (others, other_targets) in zip(plain, working, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(images, others, strict=True))
        assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(targets, other_targets, strict=True))


def test_hash_of_the_order_is_a_chain_over_ids_and_seeds(tmp_path: Path) -> None:
    feed = Feed(tiny_dataset(tmp_path, 4), 2, seed=0)
    fed = " ".join(f"{feed.dataset.items[i].image_id}:{sample_seed(0, 0, i)}" for i in feed.order(0)[:2])
    assert feed.extend_hash("", 0, 0) == hashlib.sha256(f" {fed}".encode()).hexdigest()
    assert feed.extend_hash("a", 0, 0) != feed.extend_hash("b", 0, 0)


def test_empty_training_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty"):
        Feed(tiny_dataset(tmp_path, 2).subset([]), 2, seed=0)


def test_ema_is_the_weighted_sum() -> None:
    model = torch.nn.BatchNorm1d(3)
    ema = Ema(model, 0.15)
    expected = model.weight.detach().clone()
    for n in range(4):
        with torch.no_grad():
            model.weight.add_(torch.randn(3))
            model.num_batches_tracked += 1
        decay = min(0.15, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.weight.detach()
        ema.update(model)
    torch.testing.assert_close(ema.model.weight, expected)
    assert int(ema.model.num_batches_tracked) == 4 and not ema.model.training and not ema.model.weight.requires_grad


def test_init_student_copies_neck_and_head_where_shapes_agree() -> None:
    pupil, teacher = student(0), student(1, DetectorSpec(backbone="slim-teacher", num_classes=4))
    before, source = {k: v.clone() for k, v in pupil.state_dict().items()}, teacher.state_dict()
    inherited = init_student(pupil, teacher)
    # The neck's 1x1 convolutions have as many inputs as the body has channels; everything else of neck and head fits.
    kept = {f"backbone.fpn.inner_blocks.{i}.0.weight" for i in range(3)}
    after = pupil.state_dict()
    own = {k for k in after if not k.startswith("backbone.body.")}
    assert inherited.candidates == len(own) and inherited.copied == len(own) - 3
    for name, value in after.items():
        reference = source[name] if name in own - kept else before[name]
        assert torch.equal(value, reference), name
    assert str(inherited).startswith(f"{len(own) - 3} of {len(own)} tensors")


def test_init_student_refuses_when_nothing_fits() -> None:
    with pytest.raises(ValueError, match="no tensor"):
        init_student(student(0), torch.nn.Linear(2, 2))


def test_frozen_batchnorm_is_the_bodys() -> None:
    model = student(0).train()
    count = freeze_batchnorm(model)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert 0 < count < len(layers)
    in_body = set(body(model).modules())
    assert all(m.training == (m not in in_body) == m.weight.requires_grad for m in layers)


def test_state_hash_sees_every_bit_and_name() -> None:
    first, second = student(0), student(0)
    assert state_hash(first) == state_hash(second) == state_hash(first.to(memory_format=torch.channels_last))
    with torch.no_grad():
        second.head.regression_head.bbox_ctrness.bias.add_(1e-6)
    assert state_hash(first) != state_hash(second) != state_hash(student(1))


def test_random_states_round_trip(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    checkpoint.save({"random": checkpoint.random_state(cpu)}, tmp_path / "a" / "x.pt")
    drawn = torch.rand(3), np.random.rand(3), random.random()
    checkpoint.set_random_state(checkpoint.load(tmp_path / "a" / "x.pt")["random"], cpu)
    again = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(drawn[0], again[0]) and (drawn[1] == again[1]).all() and drawn[2] == again[2]


def test_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save({"step": 1}, path)

    def torn(state: object, file: object) -> None:
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save({"step": 2}, path)
    assert checkpoint.load(path) == {"step": 1}


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoint.load(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="x.pt cannot be read"):
        checkpoint.load(tmp_path / "x.pt")


def test_second_ctrl_c_interrupts_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_students_of_a_seed_are_alike() -> None:
    assert same_state(student(3).state_dict(), student(3, SPEC).state_dict()) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_and_a_pipe_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        with Logbook(None, total=4, done=0, console=True) as log:
            log.step({"step": 2, "loss": 0.5})
            log.line("epoch 1/2 [x]")
        seen.append(stream.getvalue())
    assert "2/4" in seen[0] and "epoch 1/2 [x]" in seen[0]
    assert seen[1] == "epoch 1/2 [x]\n"


def test_resumed_log_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    with Logbook(tmp_path, total=4, done=2, console=False) as log:
        log.step({"step": 3, "loss": float("inf")})
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == ['{"step": 1}', '{"step": 2}', '{"step": 3, "loss": "inf"}']
