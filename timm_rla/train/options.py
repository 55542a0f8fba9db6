"""Options of `timm-rla train`: those of timm's train.py, with its names, defaults and meaning.

Where timm's script has an option that this command does not support, `UNSUPPORTED` lists it with its default: a value
other than that is an error, never silently ignored. Two values are additions: `--resume auto` and
`--train-crop-mode pad`.
"""
import argparse
import sys
from typing import Any, Callable, Dict, List, NoReturn, Optional, Tuple

import yaml
from timm.utils import ParseKwargs

from ..errors import UserError

__all__ = ['OptionParser', 'UNSUPPORTED', 'add_reader_options', 'parse', 'train_parser']

UNSUPPORTED: Dict[str, Any] = {
    # other ways to load data
    'train_img_sizes': None, 'train_batch_sizes': None, 'train_size_probs': None, 'train_size_schedule': 'constant',
    'train_size_schedule_spread': 0.65, 'train_size_random_mix': 0.1, 'train_batches_per_epoch': None,
    'variable_batch_loss_scale': 'none', 'use_multi_epochs_loader': False,
    'naflex_loader': False, 'naflex_train_seq_lens': [128, 256, 576, 784, 1024], 'naflex_max_seq_len': 576,
    'naflex_patch_sizes': None, 'naflex_patch_size_probs': None, 'naflex_loss_scale': 'linear',
    'naflex_patchify_channels_first': False,
    # augmentation splits
    'aug_splits': 0, 'jsd_loss': False, 'resplit': False, 'split_bn': False,
    # distillation
    'kd_model_name': None, 'kd_distill_type': 'logit', 'kd_loss_type': 'kl', 'distill_loss_weight': None,
    'task_loss_weight': None, 'kd_temperature': 4.0, 'kd_student_feature_dim': None, 'kd_teacher_feature_dim': None,
    'kd_token_distill_type': 'soft',
    # other ways to run a model
    'drop_connect': None, 'torchscript': False, 'fuser': '', 'fast_norm': False, 'synchronize_step': False,
    # other outputs
    'recovery_interval': 0, 'save_images': False, 'tta': 0,
    'log_wandb': False, 'wandb_project': None, 'wandb_tags': [], 'wandb_resume_id': '',
}


class OptionParser(argparse.ArgumentParser):
    """Parser whose errors are UserErrors and which knows the options that it lacks by name."""

    def __init__(self, *args, unsupported: Optional[Dict[str, Any]] = None, **kwargs):
        super().__init__(*args, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)
        self.unsupported = unsupported or {}

    def error(self, message: str) -> NoReturn:
        if message.startswith('unrecognized arguments: '):
            option = message.split(': ', 1)[1].split()[0].split('=')[0]
            message = self._unknown(option, option.lstrip('-').replace('-', '_'))
        raise UserError(message)

    def set_config(self, config: Dict[str, Any], source: str) -> None:
        """Take defaults from a mapping of option names (with underscores) to values.

        Raises:
            UserError: A name is no option, or one that is not supported and not at its default.
        """
        known = {action.dest: action for action in self._actions}
        for name, value in config.items():
            if name in self.unsupported and value == self.unsupported[name]:
                continue
            if name not in known or name in ('help', 'config'):
                raise UserError(f'{source}: {self._unknown(name, name)}')
            action = known[name]
            if action.choices is not None and value is not None and value not in action.choices:
                raise UserError(f'{source}: {name}: {value!r} is not one of {", ".join(map(str, action.choices))}')
            if value is not None and not isinstance(value, self._types(action)):
                expected = ' or '.join(t.__name__ for t in self._types(action))
                raise UserError(f'{source}: {name}: {value!r} is not of type {expected}')
        self.set_defaults(**{name: value for name, value in config.items() if name in known})

    @staticmethod
    def _types(action: argparse.Action) -> Tuple[type, ...]:
        if isinstance(action, ParseKwargs):
            return (dict,)
        if action.nargs == 0:
            return (bool,)
        if action.nargs in ('+', '*') or isinstance(action.nargs, int):
            return (list,)
        return (str, int, float)  # argparse itself turns a str into the option's type

    def _unknown(self, option: str, name: str) -> str:
        if name in self.unsupported:
            return f"{option}: an option of timm's train.py that {self.prog} does not support; use train.py for it"
        return f'{option}: no such option; {self.prog} --help lists them'


def add_reader_options(add: Callable[..., Any]) -> None:
    """Options, the same for training and validation, that say what to read; `add` is a parser's `add_argument`."""
    add('--data-dir', metavar='DIR', help='path to dataset (root dir)')
    add('--dataset', metavar='NAME', default='', help='dataset type + name ("<type>/<name>"), image folder if empty')
    add('--dataset-download', action='store_true', help='allow download for torch/ and tfds/ datasets')
    add('--class-map', default='', metavar='FILE', help='class to index mapping')
    add('--input-img-mode', help='image mode, such as RGB or L; by the number of input channels if not given')
    add('--input-key', help='dataset key of input images')
    add('--target-key', help='dataset key of labels')
    add('--dataset-trust-remote-code', action='store_true', help='allow a Hugging Face dataset to run its own code')


def train_parser() -> OptionParser:
    parser = OptionParser(
        prog='timm-rla train',
        description="Train a model. Options are those of timm's train.py, with the same names, defaults and meaning.",
        unsupported=UNSUPPORTED,
    )
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML file with option names and values')
    parser.add_argument('data', nargs='?', metavar='DIR', help='path to dataset (deprecated, use --data-dir)')

    add = parser.add_argument_group('Dataset').add_argument
    add_reader_options(add)
    add('--train-split', metavar='NAME', default='train', help='training split')
    add('--val-split', metavar='NAME', default='validation', help='validation split, no validation if empty')
    add('--train-num-samples', type=int, metavar='N', help='samples in an iterable training split')
    add('--val-num-samples', type=int, metavar='N', help='samples in an iterable validation split')

    add = parser.add_argument_group('Model').add_argument
    add('--model', default='resnet50', help='model name')
    add('--pretrained', action='store_true', help='start from pretrained weights')
    add('--pretrained-path', metavar='FILE', help='checkpoint to load as if it were the pretrained weights')
    add('--initial-checkpoint', default='', metavar='FILE', help='checkpoint to load after initialisation')
    add('--resume', default='', metavar='FILE', help="checkpoint to go on from; 'auto': the last of this experiment")
    add('--no-resume-opt', action='store_true', help='do not take the optimizer state from --resume')
    add('--num-classes', type=int, metavar='N', help="classes, the model's default if not given")
    add('--gp', metavar='POOL', help='global pooling: fast, avg, max, avgmax, avgmaxc')
    add('--img-size', type=int, metavar='N', help='image size')
    add('--in-chans', type=int, metavar='N', help='input channels')
    add('--input-size', nargs=3, type=int, metavar='N', help='input dimensions (channels, height, width)')
    add('--crop-pct', type=float, metavar='PCT', help='centre crop for validation, of the resized image')
    add('--mean', type=float, nargs='+', help='mean pixel value per channel, in [0, 1]')
    add('--std', type=float, nargs='+', help='standard deviation per channel')
    add('--interpolation', default='', metavar='NAME', help='image resize interpolation for validation')
    add('-b', '--batch-size', type=int, default=128, metavar='N', help='training batch size per process')
    add('-vb', '--validation-batch-size', type=int, metavar='N', help='that of validation, if it differs')
    add('--channels-last', action='store_true', help='use channels_last memory layout')
    add('--grad-accum-steps', type=int, default=1, metavar='N', help='batches per optimizer step')
    add('--grad-checkpointing', action='store_true', help='recompute activations in the backward pass')
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE', help='model arguments')
    add('--head-init-scale', type=float, help='scale of the classifier at initialisation')
    add('--head-init-bias', type=float, help='bias of the classifier at initialisation')
    add('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='compile the model')
    add('--torchcompile-mode', metavar='MODE', help='mode of torch.compile')

    add = parser.add_argument_group('Device').add_argument
    add('--device', default='cuda', help='device to use')
    add('--amp', action='store_true', help='mixed precision')
    add('--amp-dtype', default='float16', choices=('float16', 'bfloat16'), help='lower precision of --amp')
    add('--model-dtype', choices=('float32', 'float16', 'bfloat16'), help='dtype of the model itself, without --amp')
    add('--no-ddp-bb', action='store_true', help='do not broadcast buffers in DDP')
    add('--local_rank', type=int, default=0, help=argparse.SUPPRESS)
    add('--device-modules', nargs='+', metavar='MODULE', help='modules to import first')

    add = parser.add_argument_group('Optimizer').add_argument
    add('--opt', default='sgd', metavar='OPTIMIZER', help="optimizer, any of timm's")
    add('--opt-eps', type=float, metavar='EPS', help="epsilon, the optimizer's default if not given")
    add('--opt-betas', type=float, nargs='+', metavar='BETA', help="betas, the optimizer's default if not given")
    add('--momentum', type=float, default=0.9, metavar='M', help='momentum')
    add('--weight-decay', type=float, default=2e-5, help='weight decay')
    add('--clip-grad', type=float, metavar='NORM', help='clip gradients')
    add('--clip-mode', default='norm', choices=('norm', 'value', 'agc'), help='way of clipping')
    add('--layer-decay', type=float, help='learning rate decay from layer to layer')
    add('--layer-decay-min-scale', type=float, default=0, help='lower bound of that scale')
    add('--layer-decay-no-opt-scale', type=float, help='scale below which a layer is not trained')
    add('--opt-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE', help='optimizer arguments')

    add = parser.add_argument_group('Learning rate schedule').add_argument
    add('--sched', default='cosine', metavar='NAME', help='schedule: cosine, tanh, step, multistep, plateau or poly')
    add('--sched-on-updates', action='store_true', help='step the schedule at each update')
    add('--lr', type=float, help='learning rate, instead of --lr-base')
    add('--lr-base', type=float, default=0.1, metavar='LR', help='learning rate at a global batch of --lr-base-size')
    add('--lr-base-size', type=int, default=256, metavar='N', help='global batch size that --lr-base is for')
    add('--lr-base-scale', default='', choices=('', 'linear', 'sqrt'), help='scaling with it, by optimizer if empty')
    add('--lr-noise', type=float, nargs='+', metavar='PCT', help='learning rate noise on/off, parts of the epochs')
    add('--lr-noise-pct', type=float, default=0.67, metavar='PCT', help='limit of the noise')
    add('--lr-noise-std', type=float, default=1.0, metavar='STD', help='standard deviation of the noise')
    add('--lr-cycle-mul', type=float, default=1.0, metavar='MULT', help='cycle length multiplier')
    add('--lr-cycle-decay', type=float, default=0.5, metavar='MULT', help='decay per cycle')
    add('--lr-cycle-limit', type=int, default=1, metavar='N', help='number of cycles')
    add('--lr-k-decay', type=float, default=1.0, help='k-decay of cosine and poly')
    add('--warmup-lr', type=float, default=1e-5, metavar='LR', help='learning rate that the warm-up starts from')
    add('--min-lr', type=float, default=0, metavar='LR', help='lower bound of cyclic schedules')
    add('--epochs', type=int, default=300, metavar='N', help='epochs')
    add('--epoch-repeats', type=float, default=0., metavar='N', help='passes over the dataset per epoch, if not 0')
    add('--start-epoch', type=int, metavar='N', help='first epoch, instead of that of --resume')
    add('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], metavar='N', help='epochs of multistep')
    add('--decay-epochs', type=float, default=90, metavar='N', help='epochs between steps of step')
    add('--warmup-epochs', type=int, default=5, metavar='N', help='warm-up epochs')
    add('--warmup-prefix', action='store_true', help='warm-up epochs come on top')
    add('--cooldown-epochs', type=int, default=0, metavar='N', help='epochs at --min-lr at the end')
    add('--patience-epochs', type=int, default=10, metavar='N', help='patience of plateau')
    add('--decay-rate', '--dr', type=float, default=0.1, metavar='RATE', help='decay of step, multistep, plateau')

    add = parser.add_argument_group('Augmentation and regularization').add_argument
    add('--no-aug', action='store_true', help='no training augmentation')
    add('--train-crop-mode', choices=('rrc', 'rkrc', 'rkrr', 'pad'), help="'pad': pad by 4 and crop, as on CIFAR")
    add('--scale', type=float, nargs='+', default=[0.08, 1.0], metavar='PCT', help='random resize scale')
    add('--ratio', type=float, nargs='+', default=[3. / 4., 4. / 3.], metavar='RATIO', help='random aspect ratio')
    add('--hflip', type=float, default=0.5, metavar='PROB', help='probability of a horizontal flip')
    add('--vflip', type=float, default=0., metavar='PROB', help='probability of a vertical flip')
    add('--color-jitter', type=float, default=0.4, metavar='PCT', help='colour jitter')
    add('--color-jitter-prob', type=float, metavar='PROB', help='probability of any colour jitter')
    add('--grayscale-prob', type=float, metavar='PROB', help='probability of a greyscale image')
    add('--gaussian-blur-prob', type=float, metavar='PROB', help='probability of a blurred image')
    add('--aa', metavar='NAME', help='AutoAugment policy, such as rand-m9-mstd0.5')
    add('--aug-repeats', type=float, default=0, help='augmentations per image in a batch (distributed only)')
    add('--bce-loss', action='store_true', help='binary cross-entropy')
    add('--bce-sum', action='store_true', help='sum it over classes')
    add('--bce-target-thresh', type=float, help='threshold above which its targets are 1')
    add('--bce-pos-weight', type=float, help='its weight of positives')
    add('--reprob', type=float, default=0., metavar='PROB', help='probability of random erasing')
    add('--remode', default='pixel', choices=('const', 'rand', 'pixel'), help='what is written there')
    add('--recount', type=int, default=1, help='number of erased regions')
    add('--mixup', type=float, default=0., metavar='ALPHA', help='mixup')
    add('--cutmix', type=float, default=0., metavar='ALPHA', help='cutmix')
    add('--cutmix-minmax', type=float, nargs='+', metavar='RATIO', help='cutmix size, instead of its alpha')
    add('--mixup-prob', type=float, default=1.0, metavar='PROB', help='probability of either')
    add('--mixup-switch-prob', type=float, default=0.5, metavar='PROB', help='probability of cutmix if both are on')
    add('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem'), help='what shares one mixing value')
    add('--mixup-off-epoch', type=int, default=0, metavar='N', help='no mixing from this epoch on, if not 0')
    add('--smoothing', type=float, default=0.1, help='label smoothing')
    add('--train-interpolation', default='random', metavar='NAME', help='image resize interpolation for training')
    add('--drop', type=float, default=0., metavar='PROB', help='dropout before the classifier')
    add('--drop-path', type=float, metavar='PROB', help='stochastic depth')
    add('--drop-block', type=float, metavar='PROB', help='DropBlock')

    add = parser.add_argument_group('Batch norm').add_argument
    add('--bn-momentum', type=float, help='momentum, if the model takes it')
    add('--bn-eps', type=float, help='epsilon, if the model takes it')
    add('--sync-bn', action='store_true', help='synchronise statistics between processes')
    add('--dist-bn', default='reduce', choices=('broadcast', 'reduce', ''), help='share running statistics per epoch')

    add = parser.add_argument_group('Exponential moving average of the weights').add_argument
    add('--model-ema', action='store_true', help='keep one')
    add('--model-ema-force-cpu', action='store_true', help='keep it on the CPU, not validated')
    add('--model-ema-decay', type=float, default=0.9998, metavar='DECAY', help='its decay')
    add('--model-ema-warmup', action='store_true', help='let the decay grow to that')

    add = parser.add_argument_group('Run').add_argument
    add('--seed', type=int, default=42, help='random seed')
    add('--worker-seeding', default='all', choices=('all', 'part'), help='what data workers seed')
    add('--log-interval', type=int, default=50, metavar='N', help='updates between log lines')
    add('--val-interval', type=int, default=1, metavar='N', help='epochs between validations, and checkpoints')
    add('--checkpoint-hist', type=int, default=10, metavar='N', help='number of checkpoints to keep')
    add('-j', '--workers', type=int, default=4, metavar='N', help='data loading processes')
    add('--pin-mem', action='store_true', help='pin memory for the transfer to a GPU')
    add('--no-prefetcher', action='store_true', help='normalise on the CPU')
    add('--output', default='', metavar='DIR', help='folder of all runs, ./output/train if empty')
    add('--experiment', default='', metavar='NAME', help='folder of this run therein, by date and model if empty')
    add('--eval-metric', default='top1', choices=('loss', 'top1', 'top5'), help='metric of the best checkpoint')
    return parser


def parse(parser: OptionParser, argv: Optional[List[str]] = None) -> argparse.Namespace:
    """Read options from the command line and, below them, from the YAML file of `--config`.

    Raises:
        UserError: An option or a value is not known, or the file cannot be read.
    """
    argv = sys.argv[1:] if argv is None else argv
    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument('-c', '--config')
    path = config_parser.parse_known_args(argv)[0].config
    if path:
        try:
            with open(path) as f:
                config = yaml.safe_load(f) or {}
        except (OSError, yaml.YAMLError) as e:
            raise UserError(f'--config {path}: {" ".join(str(e).split())}') from e
        if not isinstance(config, dict):
            raise UserError(f'--config {path}: not a mapping of option names to values')
        parser.set_config(config, f'--config {path}')
    args = parser.parse_args(argv)
    del args.config
    return args
