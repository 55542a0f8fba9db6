"""A model at work: what a step is, how long it takes, how much memory, and how large the model is."""
import gc
import json
import math
import os
import tempfile
import time
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import FasterRCNN

from ..common.device import Placement
from ..common.in_memory import InMemoryLoader
from .precision import PRECISIONS
from .suites import Setting, detector_width

__all__ = ['Workload', 'count', 'peak_memory']

OBJECTS = 8  # of an image that a detector is trained on
DATASET = 2 ** 14  # images of a data set in memory: of 32 px, more than the caches of a CPU hold
PAD = 4  # pixels on each side of them
WARM_UP = 3  # steps; a CUDA graph is recorded in the second
CUDA_GRAPHS = ('reduce-overhead', 'max-autotune')  # modes in which the allocator does not see a step


def count(model: nn.Module, img_size: int) -> Dict[str, float]:
    """Size of a model, in the columns of timm's tables.

    Args:
        model: In eval mode, on the CPU.
        img_size: Of the image, as `take_images` takes it.

    Returns:
        Parameters in millions; for one image, multiplications (with addition) of convolutions and matrix products in
        billions, and values that these write in millions.
    """
    aten = torch.ops.aten
    written = FlopCounterMode(display=False, custom_mapping={
        op: lambda *args, out_shape, **kwargs: math.prod(out_shape)
        for op in (aten.convolution, aten.mm, aten.addmm, aten.bmm, aten.baddbmm)
    })
    flops = FlopCounterMode(display=False)
    with torch.no_grad(), written, flops:  # they cannot follow modules in inference mode
        model(torch.zeros(1, *take_images(model, img_size)))
    return dict(
        gmacs=flops.get_total_flops() / 2e9,
        macts=written.get_total_flops() / 1e6,
        param_count=sum(p.numel() for p in model.parameters()) / 1e6,
    )


def take_images(model: nn.Module, img_size: int) -> Tuple[int, int, int]:
    """Channels, height and width of images: as wide as high, but for detectors, which are to take them as they are."""
    if not isinstance(model, FasterRCNN):
        return 3, img_size, img_size
    width = detector_width(img_size)
    model.transform.min_size, model.transform.max_size = (img_size,), width
    return 3, img_size, width


def _targets(shape: Tuple[int, int, int], num_classes: int, device: torch.device) -> Dict[str, torch.Tensor]:
    """Made-up objects of one image, from a sixteenth to a half of its height."""
    _, height, width = shape
    low = torch.rand(OBJECTS, 2) * torch.tensor([width / 2, height / 2])
    size = (1 / 16 + 7 / 16 * torch.rand(OBJECTS, 2)) * height
    return dict(boxes=torch.cat([low, low + size], 1).to(device),
                labels=torch.randint(1, num_classes, (OBJECTS,), device=device))


def _loader(model: nn.Module, setting: Setting, shape: Tuple[int, int, int], place: Placement) -> InMemoryLoader:
    """Batches of a made-up data set, as `timm-rla train --in-memory` loads them."""
    channels, height, width = shape
    images = torch.randint(256, (DATASET, height + 2 * PAD, width + 2 * PAD, channels), dtype=torch.uint8)
    targets = torch.randint(model.num_classes, (DATASET,))
    return InMemoryLoader(
        images.to(place.device), targets.to(place.device), setting.batch_size, place, mean=(0.5,) * channels,
        std=(0.25,) * channels, training=setting.mode == 'train', pad=PAD, hflip=0.5)


class Workload:
    """A model with made-up images; its `step` is one of training, as in timm's benchmark.py, or of inference.

    Args:
        model: As from `variants.create`.
        setting: What to run.
        in_memory: Load each batch from a data set in memory; else all steps have the same.
    """

    def __init__(self, model: nn.Module, setting: Setting, in_memory: bool = False):
        device = torch.device(setting.device)
        precision = PRECISIONS[setting.precision]
        dtype = precision.dtype
        layout = torch.channels_last if setting.channels_last else torch.contiguous_format
        training = setting.mode == 'train'
        shape = take_images(model, setting.img_size)
        self.device = device
        self.model = model.to(device=device, dtype=dtype, memory_format=layout).train(training)
        images: Any = torch.randn(
            setting.batch_size, *shape, device=device, dtype=dtype).contiguous(memory_format=layout)
        targets: Any
        self.loss: Callable[[Any, Any], torch.Tensor]
        if isinstance(model, FasterRCNN):
            num_classes = model.roi_heads.box_predictor.cls_score.out_features
            images = list(images.sigmoid())
            targets = [_targets(shape, num_classes, device) for _ in images]
            self.loss = self._detector_loss
        else:
            targets = torch.randint(model.num_classes, images.shape[:1], device=device)
            self.loss = self._classifier_loss
        self.given = images, targets
        self.batches: Iterator[Tuple[Any, Any]] = repeat(self.given)
        if in_memory:
            place = Placement(device, dtype, channels_last=setting.channels_last)
            loader = _loader(model, setting, shape, place)
            self.given = loader.images, loader.targets
            self.batches = chain.from_iterable(repeat(loader))
        self.autocast = partial(precision.context, device.type)
        self.optimizer = create_optimizer_v2(model, opt='sgd', lr=1e-4) if training else None
        self.forward = self.model
        self.graphs = setting.torchcompile_mode in CUDA_GRAPHS
        if setting.torchcompile:
            self.forward = torch.compile(
                self.model,
                backend=setting.torchcompile,
                mode=setting.torchcompile_mode or None,
            )

    def _classifier_loss(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.forward(images), targets)

    def _detector_loss(self, images: Any, targets: Any) -> torch.Tensor:
        return sum(self.forward(images, targets).values())

    def step(self) -> None:
        """One step of training or inference."""
        images, targets = next(self.batches)
        if self.optimizer is None:
            with torch.inference_mode(), self.autocast():
                self.forward(images)
            return
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss = self.loss(images, targets)
        loss.backward()
        self.optimizer.step()

    def time(self, steps: int) -> float:
        """Seconds per step over so many steps."""
        self._synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        self._synchronize()
        return (time.perf_counter() - start) / steps

    def prepare(self) -> None:
        """Steps in which everything is compiled, tuned and allocated."""
        for _ in range(WARM_UP):
            self.step()

    def warm_up(self, seconds: float) -> int:
        """Prepare; returns the number of steps that take about so many seconds, at least one."""
        self.prepare()
        steps = 1
        while (elapsed := steps * self.time(steps)) < seconds / 4:
            steps *= 2
        return math.ceil(steps * seconds / elapsed)

    def memory(self) -> float:
        """Most bytes in use in a step: model, gradients, state of the optimizer, images (or their data set), the rest.

        Steps come before it (`prepare`). Not known, and NaN, for CUDA graphs.
        """
        if self.graphs:
            return math.nan
        state = []
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)  # so that all that the step frees is its own
            state = [value for values in self.optimizer.state.values() for value in values.values()]
        gc.collect()
        tensors = [*tree_leaves(self.given), *self.model.parameters(), *self.model.buffers(), *state]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if torch.is_tensor(t)}
        held = sum(storage.nbytes() for storage in storages.values())
        return held + peak_memory(self.step, str(self.device))

    def _synchronize(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)


def peak_memory(step: Callable[[], Any], device: str = 'cpu') -> int:
    """Most bytes that a step allocates at a time, on top of what there is before it.

    PyTorch's allocator tells, so it is exact, and the same for eager and compiled code. What libraries allocate by
    themselves, such as scratch space of oneDNN, is not in it. A CUDA graph that is replayed allocates nothing.
    """
    if device.startswith('cuda'):
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault('KINETO_LOG_LEVEL', '6')  # the profiler else reports its start and the lack of a GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'trace.json'
        profiler.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())['traceEvents'] if e['name'] == '[memory]']
    sizes: Dict[int, int] = {}  # by address; what was there before and is freed now does not count
    total = peak = 0
    for event in sorted(events, key=lambda e: e['ts']):
        address, size = event['args']['Addr'], event['args']['Bytes']
        if size > 0:
            sizes[address] = size
            total += size
            peak = max(peak, total)
        else:
            total -= sizes.pop(address, 0)
    return peak
