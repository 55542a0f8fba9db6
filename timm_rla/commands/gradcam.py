"""`timm-rla gradcam IMAGE...`: what each block of a network looks at (the paper's Figures 4 and 6)."""
import argparse
from dataclasses import replace
from pathlib import Path
from typing import List, Optional, Sequence

from ..analysis.classes import class_names, find_class
from ..analysis.explain import explain
from ..analysis.gradcam_plot import Explanation, plot_gradcam
from ..common.datasets import open_dataset
from ..common.device import Placement, place
from ..common.errors import UserError, printable
from ..common.files import check_outputs
from ..common.images import ImageNetwork, find_images, prepare_network, read_image
from ..common.networks import NetworkSpec, load_network
from ..common.options import OptionParser, add_model_options, add_reader_options, data_source, network_spec
from ..common.plotting import check_picture

__all__ = ['main']


def gradcam_parser() -> OptionParser:
    parser = OptionParser(
        prog='timm-rla gradcam',
        description='Grad-CAM of each block of a network for images, right before the layer attention scales it, with '
                    'the layer attention of the image below. Without --model the model and its input are those of '
                    '--checkpoint.',
    )
    add = parser.add_argument
    add('images', nargs='+', metavar='IMAGE', help='image, or a folder of images')
    add('--class', dest='classes', nargs='+', metavar='CLASS',
        help='class to explain, by index or name, for all images or one for each; the predicted class if not given')
    add('--layers', nargs='+', metavar='NAME', help='modules to show instead of the last norm of each block')
    add('--baseline-model', metavar='NAME', help='another network, shown above, such as resnet50')
    add('--baseline-checkpoint', default='', metavar='FILE',
        help='its weights; those of a training run name the network, too')
    add('--output', default='gradcam.png', metavar='FILE',
        help='picture, PNG, SVG or PDF by its ending; of several images FILE-1, FILE-2, ...')
    add('--sheet', action='store_true', help='all images on one sheet')
    add_model_options(add)
    add = parser.add_argument_group('Dataset, if it is to name the classes').add_argument
    add_reader_options(add)
    add('--split', metavar='NAME', default='validation', help='split')
    return parser


def main(argv: Optional[List[str]] = None) -> None:
    """Command line."""
    args = gradcam_parser().parse_args(argv)
    output = Path(args.output)
    check_picture(output)
    paths, problems = find_images(args.images)
    if not paths:
        raise UserError('; '.join(problems))
    pictures = [output] if args.sheet or len(paths) == 1 else [
        output.with_stem(f'{output.stem}-{number}') for number in range(1, len(paths) + 1)]
    check_outputs([('--output', picture) for picture in pictures],
                  [*paths, args.checkpoint, args.baseline_checkpoint, args.class_map])
    classes = args.classes or [None]
    if len(classes) not in (1, len(paths)):
        raise UserError(f'--class: {len(classes)} classes for {len(paths)} images; give one for all or one for each')
    networks = _load_networks(args, place(args.device))
    names = _class_names(args, networks[-1])
    targets = [None if text is None else find_class(text, names) for text in classes] * (len(paths) // len(classes))

    sheet: List[Explanation] = []
    for path, target, picture in zip(paths, targets, pictures * (len(paths) // len(pictures))):
        try:
            image = read_image(path)
            explanation = explain(image, path.name, networks, names, target, args.layers, args.input_img_mode)
            if args.sheet:
                sheet.append(explanation)
                continue
            print(f'{plot_gradcam([explanation], picture)}  {printable(explanation.title)}')
        except UserError as e:  # said at the end, where it is seen, when all other images are done
            problems += [str(e)] if str(e) not in problems else []
    if sheet:
        print(plot_gradcam(sheet, output))
    if problems:
        raise UserError('; '.join(problems))


def _load_networks(args: argparse.Namespace, placement: Placement) -> Sequence[ImageNetwork]:
    """The networks that the options name, on their device: the baseline, if there is one, and the network itself."""

    def load(spec: NetworkSpec, option: str = '--checkpoint') -> ImageNetwork:
        network = load_network(spec, verbose=placement.primary, option=option)
        placement.place_model(network.model)
        return prepare_network(network, args.crop_border_pixels)

    spec = network_spec(args)
    network = load(spec)
    if not args.baseline_model and not args.baseline_checkpoint:
        return [network]
    baseline = load(replace(
        spec, model=args.baseline_model, checkpoint=args.baseline_checkpoint, model_kwargs={},
        use_ema=args.use_ema and bool(args.baseline_checkpoint)), '--baseline-checkpoint')
    if baseline.model.num_classes != network.model.num_classes:
        raise UserError(f'--baseline-model {baseline.name}: has {baseline.model.num_classes} classes, {network.name} '
                        f'{network.model.num_classes}')
    return [baseline, network]


def _class_names(args: argparse.Namespace, network: ImageNetwork) -> List[str]:
    """Names of the classes of a network: of the dataset, if the options name one."""
    source, num_classes = data_source(args), network.model.num_classes
    dataset = None
    if source.data_dir or source.dataset:
        dataset = open_dataset(
            source, args.split, network.data_config['input_size'][0], num_classes, names=network.label_names)
    return class_names(num_classes, dataset, network.label_names)
