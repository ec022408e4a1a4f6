"""Batches in an order that is a function of (seed, epoch), the same for any number of workers and after any resume."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kdkernels.data import DetectionDataset, collate, sample_seed

Batch = tuple[list[Tensor], list[dict[str, Any]]]


class Feed:
    """Cuts a data set into optimiser steps of `accumulation` batches for each of `processes`.

    An epoch is one pass over the images in random order without the last incomplete step; a data set that is too small for one step is
    repeated. Sample i in epoch e is augmented with `sample_seed(seed, e, i)`.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        batch_size: int,
        seed: int,
        accumulation: int = 1,
        rank: int = 0,
        processes: int = 1,
        workers: int = 0,
    ) -> None:
        if not len(dataset):
            raise ValueError("the training set is empty")
        self.dataset = dataset
        self.batch_size, self.accumulation, self.seed = batch_size, accumulation, seed
        self.rank, self.processes, self.workers = rank, processes, workers
        self.per_step = batch_size * accumulation * processes
        self.steps_per_epoch = max(1, len(dataset) // self.per_step)
        self._order: tuple[int, list[int]] = (-1, [])

    def order(self, epoch: int) -> list[int]:
        """The images of an epoch in the order of all processes together."""
        if self._order[0] != epoch:
            self._order = (epoch, self._draw(epoch))
        return self._order[1]

    def _draw(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(sample_seed(self.seed, epoch, -1))
        order: list[int] = torch.randperm(len(self.dataset), generator=generator).tolist()
        while len(order) < self.per_step:
            order = order + order
        return order[: self.steps_per_epoch * self.per_step]

    def samples(self, epoch: int, step: int) -> list[tuple[int, int]]:
        """(index, augmentation seed) of all images of step `step` of an epoch, over all processes."""
        part = self.order(epoch)[step * self.per_step : (step + 1) * self.per_step]
        return [(i, sample_seed(self.seed, epoch, i)) for i in part]

    def steps(self, epoch: int, first: int = 0) -> Iterator[list[Batch]]:
        """The batches of this process, step by step, from step `first` of the epoch on."""
        batches: list[list[tuple[int, int]]] = []
        for step in range(first, self.steps_per_epoch):
            samples = self.samples(epoch, step)
            # Batch m of process r is the m * processes + r-th slice, so that accumulation and processes see the images of one big batch.
            for micro in range(self.accumulation):
                start = (micro * self.processes + self.rank) * self.batch_size
                batches.append(samples[start : start + self.batch_size])
        loader = DataLoader(
            self.dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=self.workers,
            # The base seed of the workers; without a generator it would be drawn from the global one, differently after a resume.
            generator=torch.Generator().manual_seed(self.seed),
        )
        step_batches: list[Batch] = []
        for wanted, batch in zip(batches, loader, strict=True):
            given = [int(target["image_id"]) for target in batch[1]]
            expected = [self.dataset.items[i].image_id for i, _ in wanted]
            if given != expected:
                raise RuntimeError(f"the loader gave images {given}, asked for were {expected}")
            step_batches.append(batch)
            if len(step_batches) == self.accumulation:
                yield step_batches
                step_batches = []

    def extend_hash(self, digest: str, epoch: int, step: int) -> str:
        """The hash chain of the data order: SHA-256 of the hash so far and the image ids and seeds of one more step."""
        fed = [f"{self.dataset.items[i].image_id}:{seed}" for i, seed in self.samples(epoch, step)]
        return hashlib.sha256(f"{digest} {' '.join(fed)}".encode()).hexdigest()
