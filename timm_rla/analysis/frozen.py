"""Layer attentions held at their means: timm's plain network from them, and what of the accuracy they carried."""
import copy
import math
from contextlib import contextmanager
from itertools import chain
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.data.distributed_sampler import OrderedDistributedSampler
from timm.utils import unwrap_model
from torch.utils.data.distributed import DistributedSampler

from ..common.device import Placement
from ..common.evaluation import batches_on_device, images_of_process
from ..common.progress import Progress
from ..models.freeze import plain_network
from .attention import attention_modules, record_attention
from .hooks import eval_mode, hooked
from .moments import Moments

__all__ = [
    'Comparison', 'block_values', 'check_freezes', 'compare', 'correct_predictions', 'freeze_at', 'freeze_attention',
    'held_attention', 'spreads', 'what_attention_carries',
]

TOLERANCE = 1e-10  # of logits in float64, relative to the largest


def freeze_attention(model: nn.Module, loader: Any, **model_kwargs: Any) -> nn.Module:
    """timm's plain network that returns what an RLA network returns with its attentions held at their means.

    Args:
        model: RLA network, not folded, on the device and in the type in which it runs.
        loader: Batches of images [B, in_chans, H, W], normalised, alone or first in a tuple or list; it is read once.
            In several processes the images are those of all if its sampler is a DistributedSampler; else each process
            is on its own.
        **model_kwargs: Arguments that the network was created with, such as `attn_layer`.

    Returns:
        timm's network of the same depth, in eval mode, with the type, the device and the data configuration of `model`,
        which is left as it is.

    Raises:
        ValueError: The model has no layer attention or no classifier, is folded, pruned or wrapped inside, has weights
            of several types or an intra-layer attention that cannot be rescaled, or was created with other arguments;
            or the loader holds no images.
    """
    model = unwrap_model(model)
    check_freezes(model, **model_kwargs)
    parameter = next(model.parameters())
    sampler = getattr(loader, 'sampler', None)
    shared = (isinstance(sampler, (DistributedSampler, OrderedDistributedSampler))
              and dist.is_available() and dist.is_initialized())
    place = Placement(parameter.device, parameter.dtype, distributed=shared,
                      world_size=sampler.num_replicas if shared else 1, rank=sampler.rank if shared else 0)
    moments, some = _mean_attention(model, loader, place)
    means = {name: values[0] for name, values in block_values(model, moments.mean).items()}
    return freeze_at(model, means, some, **model_kwargs)


def _mean_attention(model: nn.Module, loader: Any, placement: Placement) -> Tuple[Moments, torch.Tensor]:
    """Moments of all channels of all blocks over the images of all processes, K = 1, and the first two images."""
    parts: List[Moments] = []
    some: Optional[torch.Tensor] = None
    left = images_of_process(loader, placement)
    progress = Progress('Attention', _length(loader), 50, enabled=placement.primary)
    with eval_mode(model), torch.inference_mode(), record_attention(model) as attention, progress:
        for batch in loader:
            images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
            if not isinstance(images, torch.Tensor):
                raise ValueError(f'batches of {type(images).__name__}; images [B, in_chans, H, W] are expected, alone '
                                 'or first in a tuple or list')
            images = images.to(placement.device, placement.dtype)
            if some is None and len(images):
                some = images[:2]
            model(images)
            own = min(len(images), left)
            left -= own
            values = torch.cat(list(attention.values()), 1)[:own]
            parts = [Moments.merge([*parts, Moments.of(values, torch.zeros(own, dtype=torch.long), 1)])]
            progress.update(len(images) * placement.world_size)
    parts = placement.gather(parts)
    if some is None or not sum(part.count for part in parts):
        raise ValueError('the loader holds no images')
    return Moments.merge(parts), some


def _length(loader: Any) -> Optional[int]:
    """Batches of a loader; None of a stream, which does not know."""
    try:
        return len(loader)
    except TypeError:
        return None


def check_freezes(model: nn.Module, **model_kwargs: Any) -> None:
    """Complain of a network that cannot be frozen, before any images are looked at.

    Args:
        model: RLA network, not folded.
        **model_kwargs: Arguments that the network was created with.

    Raises:
        ValueError: As `freeze_attention`.
    """
    heads = attention_modules(model)
    plain_network(model, {name: torch.full((head.fc2.out_features,), 0.5) for name, head in heads.items()},
                  **model_kwargs)
    if not model.num_classes:
        raise ValueError('the network has no classifier, and so no logits that could be compared')
    types = {tensor.dtype for tensor in chain(model.parameters(), model.buffers()) if tensor.is_floating_point()}
    if len(types) > 1:
        raise ValueError(f'weights of several types, {", ".join(sorted(map(str, types)))}; freeze the network in one')


def block_values(model: nn.Module, values: torch.Tensor) -> Dict[str, torch.Tensor]:
    """Values of each channel of each block [K, sum of C] -> by the names of the blocks [K, C]"""
    heads = attention_modules(model)
    return dict(zip(heads, values.split([head.fc2.out_features for head in heads.values()], 1)))


@contextmanager
def held_attention(model: nn.Module, values: Dict[str, torch.Tensor]) -> Iterator[None]:
    """Hold layer attentions at given values.

    Args:
        model: RLA network.
        values: By the names of blocks, a_l, [C], [1, C] or [B, C]; looked up in each forward pass, so that they may
            change. Other blocks keep their attention.
    """
    heads = attention_modules(model)

    def hold(name: str) -> Any:
        return lambda head, args, output: values[name].to(output).expand_as(output)

    with hooked(model, {heads[name]: hold(name) for name in values}):
        yield


def freeze_at(
        model: nn.Module,
        means: Dict[str, torch.Tensor],
        images: torch.Tensor,
        **model_kwargs: Any,
) -> nn.Module:
    """timm's plain network of an RLA network with constant attentions, computed and checked in float64.

    Args:
        model: RLA network, not folded.
        means: Attention of each block by its name, [1] or, of RLA-vector, [C]; in (0, 1).
        images: Some images [B, in_chans, H, W], normalised, to check with.
        **model_kwargs: Arguments that the network was created with.

    Returns:
        The network, in eval mode, with the type and the device of `model`.

    Raises:
        ValueError: As `plain_network`; or, in float64, logits differ by more than 1e-10 of the largest; or a weight is
            too large for the type of `model`.
    """
    exact = copy.deepcopy(model).cpu().double().eval()
    plain = plain_network(exact, means, **model_kwargs)
    images = images.cpu().double()
    with torch.no_grad():
        with held_attention(exact, means):
            expected = exact(images)
        deviation, largest = (plain(images) - expected).abs().max().item(), expected.abs().max().item()
    if not deviation <= TOLERANCE * largest:
        raise ValueError(f'the plain network deviates by {deviation:.1e} from the one with constant attentions, whose '
                         f'largest logit is {largest:.1e}')
    parameter = next(model.parameters())
    plain.to(device=parameter.device, dtype=parameter.dtype)
    for name, weight in plain.state_dict().items():
        if not weight.isfinite().all():
            raise ValueError(f'{name} would be too large for {parameter.dtype}; freeze the network in float32')
    return plain


def correct_predictions(
        model: nn.Module,
        loader: Any,
        placement: Placement,
        label: str,
        log_interval: int = 50,
        held: Optional[Dict[str, torch.Tensor]] = None,
) -> torch.Tensor:
    """For each image of all processes, once, whether the model's first choice is its label: bool [n].

    The order is the same in every call.

    Args:
        model: Classifier, on its device.
        loader: Validation loader of this process.
        placement: Where the model is.
        label: What the progress is shown as.
        log_interval: Batches between lines of a log.
        held: Attentions to hold, by the names of blocks: [1, C] for all images, or [K, C] for those of each class.
    """
    correct: List[torch.Tensor] = []
    current = dict(held or {})
    model.eval()
    progress = Progress(label, len(loader), log_interval, 0, placement.primary)
    with torch.inference_mode(), held_attention(model, current), progress:
        for images, target, own in batches_on_device(loader, placement):
            for name, values in (held or {}).items():
                current[name] = values[target.cpu()] if len(values) > 1 else values
            with placement.blame(images), placement.autocast():
                right = model(images).argmax(1) == target
            correct.append(right[:own].cpu())
            progress.update(len(images) * placement.world_size)
    return torch.cat(placement.gather(correct))


class Comparison(NamedTuple):
    """Top-1 accuracy of two networks on the same images, in percent, and the difference in percentage points."""
    first: float
    second: float
    difference: float  # second - first
    interval: Tuple[float, float]  # 95 %

    def __str__(self) -> str:
        return '{:.2f} %, {:+.2f} points (95 % interval {:+.2f} to {:+.2f})'.format(
            self.second, self.difference, *self.interval)


def compare(first: torch.Tensor, second: torch.Tensor) -> Comparison:
    """Compare two networks image by image.

    The interval is that of Agresti and Min (Statistics in Medicine 24, 2005) for paired proportions: by the normal
    distribution, with half an image more in each of the four cells both right, both wrong, one of them right. So it
    holds where the networks differ on few images, or on none.

    Args:
        first: Whether the first network is right, bool [n].
        second: The same of the second one.
    """
    won, lost = (second & ~first).sum().item() + 0.5, (first & ~second).sum().item() + 0.5
    n = len(first) + 2
    centre = (won - lost) / n
    half = 1.959964 * math.sqrt(((won + lost) / n - centre ** 2) / n)
    interval = 100 * max(centre - half, -1), 100 * min(centre + half, 1)
    accuracies = [100 * right.double().mean().item() for right in (first, second)]
    return Comparison(*accuracies, 100 * (won - lost) / len(first), interval)


def spreads(moments: Moments, model: nn.Module) -> Dict[str, Dict[str, float]]:
    """Of each block the mean of its attention, and its standard deviations over images and over the means of classes.

    Of RLA-vector all three are means over the channels.

    Args:
        moments: Of K classes and all channels of all blocks, as from `measure_attention`.
        model: RLA network.
    """
    whole = moments.over_groups()
    present = moments.count > 0
    weights = (moments.count / moments.count.sum())[present, None]
    classes = (weights * (moments.mean[present] - whole.mean) ** 2).sum(0, keepdim=True).sqrt()
    columns = [block_values(model, values) for values in (whole.mean, whole.std, classes)]
    return {
        name: dict(zip(('mean', 'std', 'class_std'), (column[name].mean().item() for column in columns)))
        for name in columns[0]
    }


def what_attention_carries(
        model: nn.Module,
        moments: Moments,
        attended: torch.Tensor,
        loader: Any,
        placement: Placement,
        log_interval: int = 50,
) -> Dict[str, Any]:
    """Accuracy with the attentions held at the means of each image's class, and with one block at a time held.

    The first reads the labels: no classifier, but it tells whether attention depends on more than the class.

    Args:
        model: RLA network with K classes, on its device.
        moments: Of K classes and all channels of all blocks, as from `measure_attention`.
        attended: What `correct_predictions` says of the model as it is.
        loader: Validation loader of this process.
        placement: Where the model is.
        log_interval: Batches between lines of a log.

    Returns:
        `class_means`, and by the names of the blocks `held`: a Comparison with the model as it is, each as a dict.
    """
    def compare_held(label: str, held: Dict[str, torch.Tensor]) -> Dict[str, Any]:
        correct = correct_predictions(model, loader, placement, label, log_interval, held)
        return compare(attended, correct)._asdict()

    whole = moments.over_groups().mean
    classes = moments.mean.where(moments.count[:, None] > 0, whole)  # of classes without images the mean of all
    return dict(
        class_means=compare_held('Means of classes', block_values(model, classes)),
        held={name: compare_held(f'Mean in {name}', {name: mean}) for name, mean in block_values(model, whole).items()},
    )
