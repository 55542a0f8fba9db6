"""Options that have no effect without or beside another one. timm's scripts pass over them; here they are named."""
import argparse
import logging
from typing import Any, Dict, List

__all__ = ['idle_options', 'warn_of_idle_options']

_logger = logging.getLogger(__name__)

MIXING = ('mixup', 'cutmix', 'cutmix_minmax')
SIZES = ('scale', 'ratio')

WITHOUT = (  # options, and those of which they need one
    (('dataset_trust_remote_code',), ('dataset',)),
    (('no_resume_opt',), ('resume',)),
    (('amp_dtype',), ('amp',)),
    (('torchcompile_mode',), ('torchcompile',)),
    (('clip_mode',), ('clip_grad',)),
    (('layer_decay_min_scale', 'layer_decay_no_opt_scale'), ('layer_decay',)),
    (('lr_noise_pct', 'lr_noise_std'), ('lr_noise',)),
    (('warmup_lr', 'warmup_prefix'), ('warmup_epochs',)),
    (('remode', 'recount'), ('reprob',)),
    (('mixup_prob', 'mixup_mode', 'mixup_off_epoch'), MIXING),
    (('mixup_switch_prob',), ('mixup',)),
    (('mixup_switch_prob',), ('cutmix', 'cutmix_minmax')),
    (('bce_loss',), (*MIXING, 'smoothing')),  # without any of them timm takes cross-entropy
    (('bce_sum', 'bce_target_thresh', 'bce_pos_weight'), ('bce_loss',)),
    (('model_ema_decay', 'model_ema_force_cpu', 'model_ema_warmup'), ('model_ema',)),
    (('wandb_project', 'wandb_tags', 'wandb_resume_id'), ('log_wandb',)),
    (('results_format',), ('results_file',)),
    (('gamma',), ('milestones',)),
    (('warmup_factor',), ('warmup_iterations',)),
)

BESIDE = (  # options, the one that overrules them, and its value if it does so with that alone
    (('lr_base', 'lr_base_size', 'lr_base_scale'), 'lr', None),
    (('cutmix',), 'cutmix_minmax', None),
    ((*SIZES, 'train_crop_mode', 'hflip', 'vflip', 'color_jitter', 'color_jitter_prob', 'grayscale_prob',
      'gaussian_blur_prob', 'aa', 'reprob', 'train_interpolation'), 'no_aug', None),
    (SIZES, 'train_crop_mode', 'pad'),
    (('pin_mem', 'no_prefetcher', 'worker_seeding'), 'in_memory', None),
)

UNDER = (  # options, another one, and its values under which they matter
    (('decay_milestones',), 'sched', ('multistep',)),
    (('decay_epochs',), 'sched', ('step',)),
    (('decay_rate',), 'sched', ('step', 'multistep', 'plateau', 'poly')),
    (('patience_epochs',), 'sched', ('plateau',)),
    (('lr_k_decay',), 'sched', ('cosine', 'poly')),
    (('min_lr',), 'sched', ('cosine', 'tanh', 'plateau', 'poly')),
    (('lr_cycle_mul', 'lr_cycle_decay', 'lr_cycle_limit', 'cooldown_epochs'), 'sched', ('cosine', 'tanh', 'poly')),
    (('pyramid_channels',), 'neck', ('fpn',)),
)


def idle_options(options: Dict[str, Any], defaults: Dict[str, Any]) -> List[str]:
    """Options that are given and have no effect, each with the reason.

    Args:
        options: Values by the names of options, with underscores.
        defaults: Those of the command without any option or recipe.
    """
    found: Dict[str, str] = {}  # the first reason for each
    given = {name for name, value in options.items() if value != defaults.get(name)}
    for names, needed in WITHOUT:
        if not any(_is_on(options.get(option), defaults.get(option)) for option in needed):
            for name in given.intersection(names):
                found.setdefault(name, f'without {" or ".join(map(_written, needed))}')
    for names, other, value in BESIDE:
        if options.get(other) and value in (None, options[other]):
            for name in given.intersection(names):
                found.setdefault(name, f'beside {_written(other)}{f" {value}" if value else ""}')
    for names, other, values in UNDER:
        if options.get(other) not in values:
            for name in given.intersection(names):
                found.setdefault(name, f'with {_written(other)} {options.get(other)}, only with {", ".join(values)}')
    return [f'{_written(name)} has no effect {found[name]}' for name in options if name in found]


def _is_on(value: Any, default: Any) -> bool:
    """True for an option that does something: of those that are not there by default, any number."""
    return value is not None if default is None else bool(value)


def warn_of_idle_options(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Name the options that have no effect.

    Args:
        args: What is given.
        parser: A new one, which has read no recipe.
    """
    for line in idle_options(vars(args), {name: parser.get_default(name) for name in vars(args)}):
        _logger.warning(line)


def _written(name: str) -> str:
    return f'--{name.replace("_", "-")}'
