"""Options of `timm-rla train`: those of timm's train.py, with its names, defaults and meaning.

Where timm's script has an option that this command does not support, `UNSUPPORTED` lists it with its default: a value
other than that is an error, never silently ignored. README.md lists the additions.
"""
import argparse
from dataclasses import replace
from typing import Any, Callable, Dict, Optional

from timm.utils import ParseKwargs

from ..common.device import default_device
from ..common.errors import UserError
from ..common.input_spec import INTERPOLATIONS
from ..common.options import (
    OptionParser,
    add_data_folder,
    add_input_options,
    add_loading_options,
    add_precision_options,
    add_reader_options,
    data_source,
    input_spec,
    loader_spec,
)
from .data import DataSpec, SplitSpec

__all__ = ['UNSUPPORTED', 'data_spec', 'loss_arguments', 'model_arguments', 'split_spec', 'train_parser']

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
    'save_images': False, 'tta': 0,
}


# Options, for the `add_argument` of a group -----------------------------------------------------------------------

def _add_dataset(add: Callable[..., Any]) -> None:
    add_reader_options(add)
    add('--train-split', metavar='NAME', default='train', help='training split')
    add('--val-split', metavar='NAME', default='validation', help='validation split, no validation if empty')
    add('--in-memory', action='store_true',
        help='keep the data set decoded in the memory of the device, which is faster for small images')
    add('--train-num-samples', type=int, metavar='N', help='samples in an iterable training split')
    add('--val-num-samples', type=int, metavar='N', help='samples in an iterable validation split')


def _add_model(add: Callable[..., Any]) -> None:
    add('--model', default='resnet50', help='model name')
    add('--pretrained', action='store_true', help='start from pretrained weights')
    add('--pretrained-path', metavar='FILE',
        help='start from this checkpoint as from pretrained weights, with a new classifier')
    add('--initial-checkpoint', default='', metavar='FILE',
        help='checkpoint to load after initialisation; that of the network without layer attention is a warm start')
    add('--resume', default='', metavar='FILE', help="checkpoint to go on from; 'auto': the last of this experiment")
    add('--no-resume-opt', action='store_true', help='do not take the optimizer state from --resume')
    add('--num-classes', type=int, metavar='N', help='classes; if not given, those of the data')
    add('--gp', metavar='POOL', help='global pooling: fast, avg, max, avgmax, avgmaxc')
    add_input_options(add)
    add('-b', '--batch-size', type=int, default=128, metavar='N', help='training batch size per process')
    add('-vb', '--validation-batch-size', type=int, metavar='N', help='that of validation, if it differs')
    add('--grad-accum-steps', type=int, default=1, metavar='N', help='batches per optimizer step')
    add('--grad-checkpointing', action='store_true', help='recompute activations in the backward pass')
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE', help='model arguments')
    add('--head-init-scale', type=float, help='scale of the classifier at initialisation')
    add('--head-init-bias', type=float, help='bias of the classifier at initialisation')
    add('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='compile the model')
    add('--torchcompile-mode', metavar='MODE', help='mode of torch.compile')


def _add_device(add: Callable[..., Any]) -> None:
    add('--device', default=default_device(), help='device to use')
    add_precision_options(add)
    add('--no-ddp-bb', action='store_true', help='do not broadcast buffers in DDP')
    add('--local_rank', type=int, default=0, help=argparse.SUPPRESS)
    add('--device-modules', nargs='+', metavar='MODULE', help='modules to import first')


def _add_optimizer(add: Callable[..., Any]) -> None:
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


def _add_schedule(add: Callable[..., Any]) -> None:
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
    add('--min-lr', type=float, default=0, metavar='LR', help='lower bound of cosine, tanh, poly and plateau')
    add('--epochs', type=int, default=300, metavar='N', help='epochs')
    add('--epoch-repeats', type=float, default=0., metavar='N', help='passes over the dataset per epoch, if not 0')
    add('--start-epoch', type=int, metavar='N', help='first epoch, instead of that of --resume')
    add('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], metavar='N', help='epochs of multistep')
    add('--decay-epochs', type=float, default=90, metavar='N', help='epochs between steps of step')
    add('--warmup-epochs', type=int, default=5, metavar='N', help='warm-up epochs')
    add('--warmup-prefix', action='store_true', help='warm-up epochs come on top')
    add('--cooldown-epochs', type=int, default=0, metavar='N', help='epochs at --min-lr at the end')
    add('--patience-epochs', type=int, default=10, metavar='N', help='patience of plateau')
    add('--decay-rate', '--dr', type=float, default=0.1, metavar='RATE', help='decay of step, multistep, plateau, poly')


def _add_augmentation(add: Callable[..., Any]) -> None:
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
    add('--train-interpolation', default='random', choices=('', 'random', *INTERPOLATIONS),
        help='image resize interpolation for training, that of validation if empty')
    add('--drop', type=float, default=0., metavar='PROB', help='dropout before the classifier')
    add('--drop-path', type=float, metavar='PROB', help='stochastic depth')
    add('--drop-block', type=float, metavar='PROB', help='DropBlock')


def _add_batch_norm(add: Callable[..., Any]) -> None:
    add('--bn-momentum', type=float, help='momentum, if the model takes it')
    add('--bn-eps', type=float, help='epsilon, if the model takes it')
    add('--sync-bn', action='store_true', help='synchronise statistics between processes')
    add('--dist-bn', default='reduce', choices=('broadcast', 'reduce', ''), help='share running statistics per epoch')


def _add_ema(add: Callable[..., Any]) -> None:
    add('--model-ema', action='store_true', help='keep one')
    add('--model-ema-force-cpu', action='store_true', help='keep it on the CPU, not validated')
    add('--model-ema-decay', type=float, default=0.9998, metavar='DECAY', help='its decay')
    add('--model-ema-warmup', action='store_true', help='let the decay grow to that')


def _add_run(add: Callable[..., Any]) -> None:
    add('--seed', type=int, default=42, help='random seed')
    add('--worker-seeding', default='all', choices=('all', 'part'), help='what data workers seed')
    add('--log-interval', type=int, default=50, metavar='N', help='updates between log lines')
    add('--val-interval', type=int, default=1, metavar='N', help='epochs between validations, and checkpoints')
    add('--recovery-interval', type=int, default=0, metavar='N',
        help='updates between checkpoints within an epoch, none if 0')
    add('--checkpoint-hist', type=int, default=10, metavar='N', help='number of checkpoints to keep')
    add_loading_options(add)
    add('--output', default='', metavar='DIR', help='folder of all runs, ./output/train if empty')
    add('--experiment', default='', metavar='NAME', help='folder of this run therein, by date and model if empty')
    add('--log-wandb', action='store_true', help='log metrics to Weights & Biases, too')
    add('--wandb-project', metavar='NAME', help='its project')
    add('--wandb-tags', default=[], nargs='+', metavar='TAG', help='tags of its run')
    add('--wandb-resume-id', default='', metavar='ID', help='id of its run, to go on with')
    add('--log-tensorboard', action='store_true', help="log metrics for TensorBoard, into the run's folder")
    add('--eval-metric', default='top1', choices=('loss', 'top1', 'top5'), help='metric of the best checkpoint')


_GROUPS: Dict[str, Callable[..., None]] = {
    'Dataset': _add_dataset,
    'Model': _add_model,
    'Device': _add_device,
    'Optimizer': _add_optimizer,
    'Learning rate schedule': _add_schedule,
    'Augmentation and regularization': _add_augmentation,
    'Batch norm': _add_batch_norm,
    'Exponential moving average of the weights': _add_ema,
    'Run': _add_run,
}


def train_parser() -> OptionParser:
    """Parser of `timm-rla train`."""
    parser = OptionParser(
        prog='timm-rla train',
        description="Train a model. Options are those of timm's train.py, with the same names, defaults and meaning.",
        unsupported=UNSUPPORTED,
    )
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML file with option names and values')
    add_data_folder(parser.add_argument)
    for title, add_options in _GROUPS.items():
        add_options(parser.add_argument_group(title).add_argument)
    return parser


# What they say -----------------------------------------------------------------------------------------------------

def model_arguments(args: argparse.Namespace) -> Dict[str, Any]:
    """Arguments of `timm.create_model`."""
    overlay = {}
    if args.pretrained_path:
        overlay = dict(pretrained_cfg_overlay=dict(file=args.pretrained_path, num_classes=-1))  # -1: adapt the head
    return dict(
        pretrained=args.pretrained or bool(args.pretrained_path),  # timm's train.py ignores the path by itself
        in_chans=input_spec(args).channels,
        num_classes=args.num_classes,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        drop_block_rate=args.drop_block,
        global_pool=args.gp,
        bn_momentum=args.bn_momentum,
        bn_eps=args.bn_eps,
        **overlay,
    )


def split_spec(args: argparse.Namespace) -> SplitSpec:
    """What a run reads."""
    return SplitSpec(
        data_source(args),
        args.batch_size,
        args.train_split,
        args.val_split,
        args.train_num_samples,
        args.val_num_samples,
        args.seed,
        args.epoch_repeats,
    )


def data_spec(args: argparse.Namespace, num_classes: int, interpolation: str) -> DataSpec:
    """How images are augmented, and batches loaded.

    Args:
        args: Options.
        num_classes: Classes of the network.
        interpolation: That of the network, where the options name no other.

    Raises:
        UserError: Batches of an odd size, whose images cannot be mixed in pairs.
    """
    loader = loader_spec(args)
    pads = args.train_crop_mode == 'pad' and not args.no_aug
    return DataSpec(
        loader,
        replace(loader, batch_size=args.validation_batch_size or args.batch_size),
        args.seed,
        augmentation=dict(
            no_aug=args.no_aug,
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
            train_crop_mode=None if pads else args.train_crop_mode,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            vflip=args.vflip,
            color_jitter=args.color_jitter,
            color_jitter_prob=args.color_jitter_prob,
            grayscale_prob=args.grayscale_prob,
            gaussian_blur_prob=args.gaussian_blur_prob,
            auto_augment=args.aa,
            num_aug_repeats=args.aug_repeats,
            interpolation=args.train_interpolation if args.train_interpolation and not args.no_aug else interpolation,
            worker_seeding=args.worker_seeding,
        ),
        mixup=_mixup(args, num_classes),
        pad=pads,
        in_memory=args.in_memory,
        size_given=args.img_size is not None or args.input_size is not None,
    )


def _mixup(args: argparse.Namespace, num_classes: int) -> Dict[str, Any]:
    if not (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None):
        return {}
    if args.batch_size % 2:
        raise UserError(f'--batch-size {args.batch_size}: must be even to mix images, which takes pairs')
    return dict(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def loss_arguments(args: argparse.Namespace) -> Optional[Dict[str, Any]]:
    """Arguments of timm's `BinaryCrossEntropy`, None for cross-entropy."""
    if not args.bce_loss:
        return None
    return dict(target_threshold=args.bce_target_thresh, sum_classes=args.bce_sum, pos_weight=args.bce_pos_weight)
