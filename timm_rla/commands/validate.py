"""`timm-rla validate`: evaluate a model on a dataset."""
import argparse
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from timm import utils

from ..analysis.classes import class_names
from ..analysis.confusion import Confusion, format_classes, plot_confusion, write_classes, write_matrix
from ..common.device import Placement
from ..common.errors import blame
from ..common.evaluation import evaluate
from ..common.files import check_outputs, write_csv, writing_text
from ..common.idle import warn_of_idle_options
from ..common.image_folder import image_files
from ..common.networks import compile_model, load_network
from ..common.options import (
    OptionParser,
    add_data_folder,
    add_data_options,
    add_model_options,
    add_precision_options,
    network_spec,
    placement,
    validation_loader,
)
from ..common.plotting import check_picture

__all__ = ['main']

UNSUPPORTED: Dict[str, Any] = {
    'num_gpu': 1, 'test_pool': False, 'tf_preprocessing': False, 'fuser': '', 'fast_norm': False, 'torchscript': False,
    'aot_autograd': False, 'real_labels': '', 'valid_labels': '', 'retry': False, 'seed': 42, 'metrics_avg': None,
    'naflex_loader': False, 'naflex_max_seq_len': 576,
}


def validate_parser() -> OptionParser:
    parser = OptionParser(
        prog='timm-rla validate',
        description="Evaluate a model. Options are those of timm's validate.py, with the same names, defaults and "
                    'meaning, except that without --model the model and its input are those of --checkpoint, as in its '
                    'training.',
        unsupported=UNSUPPORTED,
    )
    add = parser.add_argument
    add_data_folder(add)
    add_data_options(add)
    add_model_options(add)
    add_precision_options(add)
    add('--reparam', action='store_true', help='fold the model for inference')
    add('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='compile the model')
    add('--torchcompile-mode', metavar='MODE', help='mode of torch.compile')
    add('--results-file', metavar='FILE', help='write the result there')
    add('--results-format', default='csv', choices=('csv', 'json'), help='its format')
    add('--confusion', metavar='FILE',
        help='draw a confusion matrix, PNG, SVG or PDF by its ending; beside it FILE.csv with its counts and '
             'FILE-classes.csv with the accuracy of each class')
    return parser


def main(argv: Optional[List[str]] = None) -> None:
    """Command line."""
    args = validate_parser().parse_args(argv)
    place = placement(args)
    if place.primary:
        warn_of_idle_options(args, validate_parser())
    outputs = [('--results-file', Path(args.results_file))] if args.results_file else []
    if place.primary:  # before the work, not after it
        if args.confusion:
            picture = Path(args.confusion)
            check_picture(picture, '--confusion')
            table, classes = picture.with_suffix('.csv'), picture.with_name(f'{picture.stem}-classes.csv')
            outputs += [('--confusion', path) for path in (picture, table, classes)]
        check_outputs(outputs, [args.checkpoint, args.class_map])
    result, confusion, names = _validate(args, place, outputs)
    if not place.primary:
        return
    if args.results_file:
        _write_result(result, Path(args.results_file), args.results_format)
    if args.confusion:
        title = f'{result["model"]}, {int(confusion.images.sum()):,} images, {result["top1"]:.2f} % top-1'
        write_matrix(confusion, names, table)
        write_classes(confusion, names, classes)
        plot_confusion(confusion, names, picture, title)
    print(format_classes(confusion, names))
    print(f'--result\n{json.dumps(result, indent=4)}')


def _validate(
        args: argparse.Namespace,
        place: Placement,
        outputs: Sequence[Tuple[str, Path]],
) -> Tuple['OrderedDict[str, Any]', Confusion, List[str]]:
    """Evaluate as the options say; `outputs` are the files that will be written, by their options.

    Returns:
        Row in the columns of timm's validate.py: accuracy and error in percent, parameters in millions. Confusion
        matrix over the images of all processes, and the names of the classes.

    Raises:
        UserError: Bad input.
    """
    network = load_network(network_spec(args).or_hosted(), verbose=place.primary)
    model, data_config = network.model, network.data_config
    param_count = sum(p.numel() for p in model.parameters())
    if args.reparam:
        model = utils.reparameterize_model(model)
    model = place.place_model(model)
    loader = validation_loader(args, network, place)
    if place.primary:
        check_outputs(outputs, image_files(loader.dataset))
    model = compile_model(model, args.torchcompile, args.torchcompile_mode)
    predictions: List[torch.Tensor] = []
    metrics = evaluate(model, loader, place, log_interval=args.log_freq, predictions=predictions)
    num_classes = network.model.num_classes
    row = OrderedDict(
        model=network.name,
        top1=round(metrics['top1'], 4),
        top1_err=round(100 - metrics['top1'], 4),
        top5=round(metrics['top5'], 4),
        top5_err=round(100 - metrics['top5'], 4),
        param_count=round(param_count / 1e6, 2),
        img_size=data_config['input_size'][-1],
        crop_pct=data_config['crop_pct'],
        interpolation=data_config['interpolation'],
    )
    confusion = Confusion.of(*torch.cat(place.gather(predictions), 1), num_classes)
    return row, confusion, class_names(num_classes, loader.dataset, network.label_names)


def _write_result(result: Dict[str, Any], path: Path, fmt: str) -> None:
    """Write one result as CSV (header and row) or JSON."""
    if fmt == 'csv':
        write_csv(path, result, [result.values()], '--results-file')
        return
    with blame(f'--results-file {path}', OSError), writing_text(path) as f:
        json.dump(result, f, indent=4)
