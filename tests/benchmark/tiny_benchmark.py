"""A setting that takes no time, and a stand-in for the processes of a benchmark that needs no start."""
import csv

import torch

from timm_rla.benchmark import processes
from timm_rla.benchmark.suites import Setting

TINY = Setting(('resnet20_cifar', 'rla_resnet20_cifar'), mode='infer', batch_size=2, img_size=32, device='cpu')


def rows_of(path):
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


class InThisProcess:
    """Does what `processes.Process` does, without a process."""

    def __init__(self, name, setting):
        self.name, self.setting = name, setting
        self.workload = None

    def ready(self):
        allocator = processes._start(self.name, self.setting, torch.get_num_threads())
        self.workload = processes._workload
        return allocator

    def call(self, method, *args):
        return getattr(self.workload, method)(*args)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.workload = processes._workload = None


def memory_kept_of(size):
    """Bytes that a process still holds of a tensor of so many bytes after that is freed."""
    before = _resident()
    tensor = torch.ones(size, dtype=torch.uint8)
    del tensor
    return _resident() - before


def _resident():
    with open('/proc/self/statm') as f:
        return 4096 * int(f.read().split()[1])
