"""Values that options may have. An option has the same meaning, and so the same range, in every command."""
import math
import reprlib
from typing import Any, Dict, NamedTuple, Optional

from .errors import UserError

__all__ = ['RANGES', 'check_ranges']

LARGEST = 1e12  # for what has no bound of its own: libraries fail at much larger ones


class Range(NamedTuple):
    """Numbers from `low` to `high`, both included unless `above` or `below` says otherwise."""
    low: float
    high: float = LARGEST
    above: bool = False  # without `low`
    below: bool = False  # without `high`

    def holds(self, value: float) -> bool:
        """True for a number of the range; never for nan."""
        return (self.low < value if self.above else self.low <= value) and (
            value < self.high if self.below else value <= self.high) and math.isfinite(value)

    def __str__(self) -> str:
        if self.high == LARGEST:
            return f'{"above" if self.above else "at least"} {self.low:g} and at most {self.high:g}'
        bounds = [f'{bound:g}' + ' (excluded)' * out for bound, out in zip(self[:2], self[2:])]
        return f'from {bounds[0]} to {bounds[1]}'


COUNT = Range(1)
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, above=True)
PROBABILITY = Range(0, 1)
FRACTION = Range(0, 1, below=True)

RANGES: Dict[str, Range] = {
    **dict.fromkeys((
        'batch_size', 'validation_batch_size', 'num_classes', 'in_chans', 'log_interval', 'log_freq',
        'val_interval', 'checkpoint_hist', 'train_num_samples', 'val_num_samples', 'num_samples', 'recount',
        'lr_cycle_limit', 'lr_base_size', 'topk', 'jobs', 'iterations', 'base_batch_size', 'accumulate',
        'epochs', 'rounds', 'starts', 'eval_interval', 'checkpoint_interval',
    ), COUNT),
    **dict.fromkeys((  # of detectors, whose checkpoints may ask for no more memory than this
        'pyramid_channels', 'rpn_pre_nms_top_n_train', 'rpn_pre_nms_top_n_test', 'rpn_post_nms_top_n_train',
        'rpn_post_nms_top_n_test', 'rpn_batch_size_per_image', 'box_batch_size_per_image', 'box_detections_per_img',
    ), Range(1, 100_000)),
    **dict.fromkeys(('anchor_sizes', 'min_size'), Range(1, 10_000)),
    'max_size': COUNT,  # it only makes smaller
    'roi_size': Range(1, 999),
    **dict.fromkeys((
        'start_epoch', 'recovery_interval', 'grad_accum_steps', 'weight_decay', 'lr', 'lr_base', 'min_lr', 'warmup_lr',
        'warmup_epochs', 'cooldown_epochs', 'patience_epochs', 'epoch_repeats', 'decay_milestones', 'mixup_off_epoch',
        'color_jitter', 'aug_repeats', 'mixup', 'cutmix', 'bce_pos_weight', 'crop_border_pixels', 'lr_noise_std',
        'opt_betas', 'lr_noise', 'lr_cycle_decay', 'milestones', 'warmup_iterations',
    ), NOT_NEGATIVE),
    **dict.fromkeys((
        'decay_epochs', 'decay_rate', 'opt_eps', 'bn_eps', 'clip_grad', 'std', 'scale', 'ratio',
        'lr_cycle_mul', 'lr_k_decay', 'gamma', 'anchor_ratios',
    ), POSITIVE),
    'warmup_factor': Range(0, 1, above=True),
    **dict.fromkeys((
        'hflip', 'vflip', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob', 'reprob', 'mixup_prob',
        'mixup_switch_prob', 'drop', 'drop_block', 'drop_rate', 'drop_path_rate', 'drop_block_rate', 'cutmix_minmax',
        'bce_target_thresh', 'lr_noise_pct', 'bn_momentum', 'model_ema_decay', 'momentum', 'layer_decay',
        'layer_decay_min_scale', 'layer_decay_no_opt_scale', 'mean', 'box_score_thresh', 'box_nms_thresh',
        'box_positive_fraction', 'score_thresh',
    ), PROBABILITY),
    **dict.fromkeys(('smoothing', 'drop_path'), FRACTION),
    'crop_pct': Range(0.1, 2),  # a part of the image, no percentage; above 1 with a margin
    **dict.fromkeys(('img_size', 'input_size'), Range(1, 8192)),  # an image that fits into memory
    'seconds': Range(0, 3600, above=True),
    **dict.fromkeys(('head_init_scale', 'head_init_bias'), Range(-LARGEST)),
    'workers': Range(0, 1024),
    'threads': Range(1, 1024),
    **dict.fromkeys(('seed', 'seeds'), Range(0, 2 ** 32 - 2 ** 16)),  # NumPy's, and each process adds its rank
}


PAIRS = ('scale', 'ratio', 'cutmix_minmax')  # of a least and a largest number
DIFFERENT = ('cutmix_minmax',)  # the pairs whose two numbers may not be the same
MAY_BE_EMPTY = ('milestones', 'decay_milestones')  # a list without a number says something there


def check_ranges(options: Dict[str, Any], source: Optional[str] = None) -> None:
    """Complain of a number that an option cannot have.

    Args:
        options: Values by the names of options, with underscores.
        source: What holds them, for the message; the command line if None.

    Raises:
        UserError: There is one, or a pair that is none; names the option, the value and the range.
    """
    for name in RANGES.keys() & options.keys():
        value = options[name]
        is_list = isinstance(value, (list, tuple)) and (value or name in (*MAY_BE_EMPTY, *PAIRS))
        for number in value if is_list else [value]:
            if number is None and value is None:
                continue
            if not isinstance(number, (int, float)) or isinstance(number, bool) or not RANGES[name].holds(number):
                subject = f'{source}: {name}' if source else f'--{name.replace("_", "-")}'
                raise UserError(f'{subject} {reprlib.repr(number)}: must be {RANGES[name]}')
    for name in PAIRS:
        pair = options.get(name)
        if isinstance(pair, (list, tuple)) and (
                len(pair) != 2 or pair[0] > pair[1] or pair[0] == pair[1] and name in DIFFERENT):
            subject = f'{source}: {name}' if source else f'--{name.replace("_", "-")}'
            raise UserError(f'{subject} {" ".join(map(str, pair))}: must be two numbers, the least and the largest')
