"""Validation in several processes, of which some have images twice for all to have as many."""
import threading

import pytest
import torch
import torch.nn as nn

from timm_rla.common.device import Placement
from timm_rla.common.evaluation import evaluate


class Loader(list):
    """Batches of a process, as timm's ordered sampler deals them out."""

    def __init__(self, dataset, rank, world_size, batch_size):
        count = -(-len(dataset) // world_size)
        indices = [index % len(dataset) for index in range(rank, count * world_size, world_size)]
        batches = [indices[start:start + batch_size] for start in range(0, count, batch_size)]
        super().__init__(tuple(torch.stack(part) for part in zip(*(dataset[i] for i in batch))) for batch in batches)
        self.dataset = dataset


@pytest.fixture
def run_together(monkeypatch):
    """Calls functions in a thread each; `all_reduce` adds over them."""
    def call(functions):
        barrier, tensors, results = threading.Barrier(len(functions)), {}, {}

        def all_reduce(tensor, *args, **kwargs):
            tensors[threading.get_ident()] = tensor.clone()
            barrier.wait()
            total = sum(tensors.values())
            barrier.wait()
            tensor.copy_(total)

        monkeypatch.setattr(torch.distributed, 'all_reduce', all_reduce)
        threads = [threading.Thread(target=lambda i=i, f=f: results.update({i: f()})) for i, f in enumerate(functions)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        return [results[i] for i in range(len(functions))]

    return call


@pytest.mark.parametrize('images, batch_size', [(3, 2), (5, 1), (7, 4), (8, 2)])
def test_each_image_counts_once(run_together, images, batch_size):
    generator = torch.Generator().manual_seed(0)
    dataset = [(torch.randn(6, generator=generator), torch.tensor(i % 6)) for i in range(images)]
    model = nn.Identity()
    one = evaluate(model, Loader(dataset, 0, 1, images), Placement(torch.device('cpu')), predictions=[])
    found = [[], []]
    results = run_together([
        lambda rank=rank: evaluate(
            model, Loader(dataset, rank, 2, batch_size),
            Placement(torch.device('cpu'), rank=rank, world_size=2, distributed=True), predictions=found[rank])
        for rank in range(2)
    ])
    for result in results:
        assert result == pytest.approx(one)
    assert sum(batch.shape[1] for batches in found for batch in batches) == images
