"""Options that commands share, and what they say: where data are, which network, on which device."""
import argparse
import ast
import errno
import logging
import os
import reprlib
import sys
from dataclasses import replace
from typing import Any, Callable, Dict, List, NoReturn, Optional, Tuple

from timm.utils import ParseKwargs

from .datasets import DataSource, describe_dataset, open_dataset
from .device import Placement, default_device, default_workers, place
from .errors import UserError, closest, one_line
from .input_spec import InputSpec
from .loaders import LoaderSpec, create_eval_loader
from .networks import Network, NetworkSpec
from .ranges import check_ranges
from .recipes import find_recipe
from .yaml_files import read_mapping

__all__ = [
    'OptionParser', 'add_data_folder', 'add_data_options', 'add_input_options', 'add_loading_options',
    'add_model_options', 'add_precision_options', 'add_reader_options', 'data_source', 'input_spec', 'loader_spec',
    'network_spec', 'parse', 'placement', 'validation_loader',
]

_logger = logging.getLogger(__name__)

PATHS = ('CHECKPOINT', 'DIR', 'FILE', 'IMAGE', 'PATTERN', 'RUN')  # how files are named in the help


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

    def parse_known_args(self, args=None, namespace=None):  # what parse_args calls, too
        for action in self._actions:
            if isinstance(action, ParseKwargs):  # timm's, which takes whatever it gets
                action.type = _key_value
        found, rest = super().parse_known_args(args, namespace)
        check_ranges(vars(found))
        self._check_paths(vars(found))
        return found, rest

    def _check_paths(self, found: Dict[str, Any]) -> None:
        """Complain of names of files that no file can have. An empty one is the current folder to most libraries."""
        for action in self._actions:
            value = found.get(action.dest) if action.metavar in PATHS else None
            for text in value if isinstance(value, list) else [value]:
                if not isinstance(text, str) or text == action.default:
                    continue
                subject = action.option_strings[-1] if action.option_strings else action.metavar
                if not text:
                    raise UserError(f"{subject} '': is empty")
                try:
                    os.lstat(text)
                except ValueError as e:  # a null in it
                    raise UserError(f'{subject} {text}: {one_line(e)}') from e
                except OSError as e:
                    if e.errno == errno.ENAMETOOLONG:
                        raise UserError(f'{subject} {text}: {e.strerror}') from e

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
            action, shown = known[name], 'null' if value is None else reprlib.repr(value)
            if action.choices is not None and value not in (*action.choices, action.default):
                raise UserError(f'{source}: {name}: {shown} is not one of '
                                f'{", ".join(map(str, action.choices))}')
            if not self._fits(action, value):
                raise UserError(f'{source}: {name}: {shown} is not of type {self._kind(action)}')
        check_ranges({name: value for name, value in config.items() if not isinstance(value, str)}, source)
        self.set_defaults(**{name: value for name, value in config.items() if name in known})

    @classmethod
    def _fits(cls, action: argparse.Action, value: Any) -> bool:
        """True for a value that an option may have in a recipe; null only where that means that it is not given."""
        kind = cls._kind(action)
        if value is None:
            return action.default is None
        if kind == 'dict':
            return isinstance(value, dict)
        if isinstance(value, bool) or kind == 'bool':
            return isinstance(value, bool) and kind == 'bool'
        types: Dict[Any, Tuple[type, ...]] = {int: (int,), float: (int, float)}
        single = types.get(action.type, (str,))
        if kind.startswith('list'):
            number = action.nargs if isinstance(action.nargs, int) else None
            return isinstance(value, list) and number in (None, len(value)) and all(
                isinstance(entry, single) and not isinstance(entry, bool) for entry in value)
        return isinstance(value, (*single, str))  # argparse itself turns a str into the option's type

    @staticmethod
    def _kind(action: argparse.Action) -> str:
        """Type of an option's values, in words."""
        if isinstance(action, ParseKwargs):
            return 'dict'
        if action.nargs == 0:
            return 'bool'
        single = action.type.__name__ if action.type in (int, float) else 'str'
        if action.nargs in ('+', '*') or isinstance(action.nargs, int):
            return f'list of {single}' + f', {action.nargs} of them' * isinstance(action.nargs, int)
        return single

    def _unknown(self, option: str, name: str) -> str:
        if name in self.unsupported:
            script = f'{self.prog.split()[-1]}.py'  # timm's, of the same name
            return f"{option}: an option of timm's {script} that {self.prog} does not support; use {script} for it"
        written = [text for action in self._actions for text in action.option_strings]
        known = written if option.startswith('-') else [action.dest for action in self._actions]
        return f'{option}: no such option of {self.prog}; {closest(option, known)}'


def _key_value(text: str) -> str:
    """The text of KEY=VALUE as it is, for timm's `ParseKwargs`."""
    key, equals, value = text.partition('=')
    if text and not (key.isidentifier() and equals and value):
        raise argparse.ArgumentTypeError(f'{text!r} is not KEY=VALUE')
    if value[:1] in tuple('([{'):  # it would be taken as text
        try:
            ast.literal_eval(value)
        except (ValueError, SyntaxError) as e:
            raise argparse.ArgumentTypeError(f'{text!r}: {value} is no list or tuple of Python') from e
    return text


# Options, for the `add_argument` of a parser or of a group of one --------------------------------------------------

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


def add_loading_options(add: Callable[..., Any]) -> None:
    """Options, the same for training and validation, that say how it is read; `add` is a parser's `add_argument`."""
    add('-j', '--workers', type=int, default=default_workers(), metavar='N', help='data loading processes')
    add('--no-prefetcher', action='store_true', help='normalise on the CPU')
    add('--pin-mem', action='store_true', help='pin memory for the transfer to a GPU')


def add_data_folder(add: Callable[..., Any]) -> None:
    """The folder of the images, as timm's scripts take it, too; `add` is a parser's `add_argument`."""
    add('data', nargs='?', metavar='DIR', help='path to dataset (deprecated, use --data-dir)')


def add_data_options(add: Callable[..., Any], split: str = 'validation', split_help: str = 'split') -> None:
    """Options that say what is read and how, in one pass; `add` is a parser's `add_argument`."""
    add_reader_options(add)
    add('--split', metavar='NAME', default=split, help=split_help)
    add('--num-samples', type=int, metavar='N', help='samples in an iterable split')
    add('-b', '--batch-size', type=int, default=256, metavar='N', help='batch size')
    add('--log-freq', type=int, default=10, metavar='N', help='batches between log lines')
    add_loading_options(add)


def add_input_options(add: Callable[..., Any]) -> None:
    """Options, the same for training and validation, of a network's input; `add` is a parser's `add_argument`."""
    add('--img-size', type=int, metavar='N', help='image size')
    add('--in-chans', type=int, metavar='N', help='input channels')
    add('--input-size', nargs=3, type=int, metavar='N', help='input dimensions (channels, height, width)')
    add('--crop-pct', type=float, metavar='PCT', help='centre crop for validation, of the resized image')
    add('--mean', type=float, nargs='+', help='mean pixel value per channel, in [0, 1]')
    add('--std', type=float, nargs='+', help='standard deviation per channel')
    add('--interpolation', default='', metavar='NAME', help='image resize interpolation for validation')


def add_model_options(add: Callable[..., Any]) -> None:
    """Options that name a trained model, its input and its device; `add` is a parser's `add_argument`."""
    add('-m', '--model', help='model name')
    add('--pretrained', action='store_true',
        help='use pretrained weights, as validate and predict do without --checkpoint')
    add('--checkpoint', default='', metavar='FILE', help='weights')
    add('--use-ema', action='store_true', help='use the EMA weights of --checkpoint')
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE', help='model arguments')
    add('--num-classes', type=int, metavar='N', help='classes')
    add('--gp', metavar='POOL', help='global pooling')
    add_input_options(add)
    add('--use-train-size', action='store_true',
        help='use the training size of the model, not that for testing; without --model that of the run in any case')
    add('--crop-mode', help='squash, border or center')
    add('--crop-border-pixels', type=int, metavar='N', help='crop this border')
    add('--device', default=default_device(), help='device to use')


def add_precision_options(add: Callable[..., Any]) -> None:
    """Options that say in which layout and precision a model runs; `add` is a parser's `add_argument`."""
    add('--channels-last', action='store_true', help='use channels_last memory layout')
    add('--amp', action='store_true', help='mixed precision')
    add('--amp-dtype', default='float16', choices=('float16', 'bfloat16'), help='lower precision of --amp')
    add('--model-dtype', choices=('float32', 'float16', 'bfloat16'), help='dtype of the model itself, without --amp')


# What they say -----------------------------------------------------------------------------------------------------

def data_source(args: argparse.Namespace) -> DataSource:
    """What `add_reader_options` tell.

    Raises:
        UserError: Two folders.
    """
    positional = getattr(args, 'data', None)
    if args.data_dir and positional and positional != args.data_dir:
        raise UserError(f'DIR {positional}: is another folder than --data-dir {args.data_dir}; leave one out')
    return DataSource(
        data_dir=args.data_dir or positional,
        dataset=args.dataset,
        class_map=args.class_map,
        download=args.dataset_download,
        input_img_mode=args.input_img_mode,
        input_key=args.input_key,
        target_key=args.target_key,
        trust_remote_code=args.dataset_trust_remote_code,
    )


def loader_spec(args: argparse.Namespace) -> LoaderSpec:
    """What `add_data_options` tell of batches."""
    return LoaderSpec(args.batch_size, args.workers, args.pin_mem, not args.no_prefetcher)


def input_spec(args: argparse.Namespace) -> InputSpec:
    """What `add_model_options`, or the options of training, tell of a network's input."""
    return InputSpec(
        in_chans=args.in_chans,
        img_size=args.img_size,
        input_size=args.input_size,
        mean=args.mean,
        std=args.std,
        interpolation=args.interpolation,
        crop_pct=args.crop_pct,
        crop_mode=getattr(args, 'crop_mode', None),
    )


def network_spec(args: argparse.Namespace) -> NetworkSpec:
    """What `add_model_options` tell."""
    return NetworkSpec(
        model=args.model,
        model_kwargs=args.model_kwargs,
        pretrained=args.pretrained,
        checkpoint=args.checkpoint,
        use_ema=args.use_ema,
        num_classes=args.num_classes,
        global_pool=args.gp,
        input=input_spec(args),
        use_test_size=not args.use_train_size,
    )


def placement(args: argparse.Namespace) -> Placement:
    """What --device and `add_precision_options` tell; sets up the device and, under torchrun, the process group."""
    return place(args.device, args.model_dtype, args.amp_dtype if args.amp else None, args.channels_last)


def validation_loader(
        args: argparse.Namespace,
        network: Network,
        place: Placement,
        split_option: str = '--split',
) -> Any:
    """Loader of the images that `add_data_options` name, of the split that an option names, in the network's input.

    Raises:
        UserError: Missing or empty folder, or classes that the network does not have.
    """
    source = data_source(args)
    split = getattr(args, split_option.removeprefix('--').replace('-', '_'))
    num_samples = args.num_samples if split_option == '--split' else args.val_num_samples
    dataset = open_dataset(
        replace(source, input_img_mode=source.input_img_mode or network.image_mode),
        split,
        in_chans=network.data_config['input_size'][0],
        num_classes=network.model.num_classes,
        num_samples=num_samples,
        batch_size=args.batch_size,
        split_option=split_option,
        counted_by='--num-classes' if getattr(args, 'num_classes', None) else f'classes of {network.name}:',
        names=network.label_names,
    )
    if place.primary:
        _logger.info(describe_dataset(dataset, split, num_samples))
    return create_eval_loader(
        dataset,
        loader_spec(args),
        network.data_config,
        place,
        crop_mode=network.data_config['crop_mode'],
        crop_border_pixels=getattr(args, 'crop_border_pixels', None),
    )


def parse(parser: OptionParser, argv: Optional[List[str]] = None) -> argparse.Namespace:
    """Read options from the command line and, below them, from the recipe that `--config` names or the file that it is.

    Raises:
        UserError: An option or a value is not known, or the file cannot be read.
    """
    argv = sys.argv[1:] if argv is None else argv
    config_parser = OptionParser(prog=parser.prog, add_help=False)
    config_parser.add_argument('-c', '--config', metavar='FILE')
    path = config_parser.parse_known_args(argv)[0].config
    if path is not None:
        parser.set_config(read_mapping(find_recipe(path), f'--config {path}'), f'--config {path}')
    args = parser.parse_args(argv)
    del args.config
    return args
