"""From what a user asks for to a plan, the list of settings to measure; whatever cannot be measured is said here."""
from pathlib import Path
from typing import Any, List, Optional, Sequence

import timm
from timm.models import get_pretrained_cfg

from ..common.device import check_device
from ..common.environment import describe_environment
from ..common.errors import UserError, blame, closest
from .results import find, read
from .suites import SUITES, Setting
from .variants import FOLDED, TRITON, is_detector, suffixes

__all__ = ['check_devices', 'not_measured', 'plan_models', 'plan_suite']

DETECTOR_SIZE = 800  # short side of images in torchvision


def plan_suite(suite: str, only: Sequence[str] = ()) -> List[Setting]:
    """Settings of a suite.

    Args:
        suite: A key of `SUITES`.
        only: Words; a setting is taken if its name has one of them in it. All settings if empty.

    Raises:
        UserError: No setting has such a word in its name.
    """
    settings = SUITES[suite]
    for word in only:
        if not any(word in setting.name for setting in settings):
            raise UserError(f'--only {word}: not in {", ".join(setting.name for setting in settings)}')
    return [setting for setting in settings if not only or any(word in setting.name for word in only)]


def plan_models(
        models: Sequence[str],
        modes: Sequence[str],
        batch_sizes: Sequence[int],
        device: str,
        baseline: Optional[str] = None,
        img_size: Optional[int] = None,
        model_kwargs: Sequence[str] = (),
        **how: Any,
) -> List[Setting]:
    """A setting for each mode and batch size.

    Args:
        models: Names in the notation of `variants.create`.
        modes: 'train', 'infer' or both.
        batch_sizes: Images per step.
        device: 'cpu', 'cuda' or 'cuda:N'.
        baseline: The one of the models that ratios refer to, the first if None.
        img_size: Height and width of images in pixels, those that the baseline is made for if None. Detectors have
            images that are wider by a third, and all models are detectors then.
        model_kwargs: Arguments of every model, each as 'KEY=VALUE'.
        **how: Further arguments of `Setting`.

    Raises:
        UserError: Unknown, repeated or unsuitable models.
    """
    for name in models:
        _check_model(name, modes, device)
        if models.count(name) > 1:
            raise UserError(f'--model {name}: given twice')
    baseline = baseline or models[0]
    if baseline not in models:
        raise UserError(f'--baseline {baseline}: not among the models {", ".join(models)}')
    if len(set(map(is_detector, models))) > 1:
        raise UserError(f'--model {" ".join(models)}: detectors and classifiers have other images and losses')
    names = [baseline, *(name for name in models if name != baseline)]
    return [
        Setting(
            models=tuple('+'.join([name, *model_kwargs]) for name in names),
            mode=mode,
            batch_size=batch_size,
            img_size=img_size or (
                DETECTOR_SIZE if is_detector(baseline) else get_pretrained_cfg(baseline.split('+')[0]).input_size[-1]),
            device=device,
            **how,
        )
        for mode in dict.fromkeys(modes) for batch_size in dict.fromkeys(batch_sizes)
    ]


def _check_model(name: str, modes: Sequence[str], device: str) -> None:
    base = name.split('+')[0]
    if not timm.is_model(base):
        raise UserError(f'--model {name}: no such model; {closest(base, timm.list_models())}')
    with blame(f'--model {name}', RuntimeError):  # no such tag
        get_pretrained_cfg(base)
    chosen = suffixes(name)
    if FOLDED in chosen and 'train' in modes:
        raise UserError(f'--model {name}: a folded model cannot be trained; --modes infer')
    if TRITON in chosen and not device.startswith('cuda'):
        raise UserError(f'--model {name}: the Triton kernels are for GPUs; --device cuda')


def check_devices(plan: Sequence[Setting]) -> None:
    """Make sure that this machine has all devices of a plan.

    Raises:
        UserError: It has not.
    """
    for name in dict.fromkeys(setting.device for setting in plan):
        check_device(name)
        if not name.startswith(('cpu', 'cuda')):
            raise UserError(f'--device {name}: neither cpu nor cuda')


def not_measured(plan: Sequence[Setting], output: Path) -> List[Setting]:
    """Settings of a plan whose rows for this machine are not all in a table.

    Raises:
        UserError: The file is no such table.
    """
    rows = read(output)

    def is_measured(setting: Setting) -> bool:
        hardware = describe_environment(setting.device)['hardware']
        return len(find([row for row in rows if row['hardware'] == hardware], setting)) == len(setting.models)

    return [setting for setting in plan if not is_measured(setting)]
