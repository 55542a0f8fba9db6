"""`timm-rla gradcam IMAGE...`: what each block of a network looks at (the paper's Figures 4 and 6)."""
import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import torch
import torch.nn as nn
from PIL import Image
from timm.data import create_transform, get_img_extensions
from timm.utils import setup_default_logging
from torchvision import transforms

from ..errors import UserError, blame
from ..plotting import check_picture
from ..train.options import OptionParser, add_reader_options
from ..train.setup import setup_device
from ..train.trained import add_model_options, create_validation_loader, load_model, place_model
from .attention import attention_modules, normalize_attention, record_attention, stack_attention
from .classes import class_names, find_class, short_name
from .gradcam import grad_cam
from .gradcam_plot import Explanation, NetworkMaps, plot_gradcam

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
    add_reader_options(parser.add_argument_group('Dataset, if it is to name the classes').add_argument)
    add('--split', metavar='NAME', default='validation', help=argparse.SUPPRESS)
    parser.set_defaults(  # what models and datasets can be told elsewhere
        amp=False, model_dtype=None, channels_last=False, no_prefetcher=True, pin_mem=False,
        data=None, num_samples=None, batch_size=1, workers=0, log_freq=1)
    return parser


class Network(NamedTuple):
    """A network and how an image becomes its input."""
    name: str
    model: nn.Module
    config: Dict[str, Any]  # timm's data configuration
    transform: transforms.Compose


def main(argv: Optional[List[str]] = None) -> None:
    """Command line."""
    setup_default_logging()
    args = gradcam_parser().parse_args(argv)
    output = Path(args.output)
    check_picture(output)
    problems: List[str] = []  # with single images; said at the end, where they are seen, when all others are done
    paths = find_images(args.images, problems)
    if not paths:
        raise UserError('; '.join(problems))
    classes = args.classes or [None]
    if len(classes) not in (1, len(paths)):
        raise UserError(f'--class: {len(classes)} classes for {len(paths)} images; give one for all or one for each')
    device = setup_device(args)
    baseline_args = argparse.Namespace(**{
        **vars(args), 'model': args.baseline_model, 'checkpoint': args.baseline_checkpoint, 'model_kwargs': {}})
    networks = [load_network(args, device)]
    if args.baseline_model or args.baseline_checkpoint:
        networks.insert(0, load_network(baseline_args, device))
        _check_same_classes(networks)
    names = _class_names(args, networks[-1], device)
    targets = [text and find_class(text, names) for text in classes] * (len(paths) // len(classes))

    sheet: List[Explanation] = []
    for number, (path, target) in enumerate(zip(paths, targets), start=1):
        try:
            image = read_image(path)
        except UserError as e:
            problems.append(str(e))
            continue
        explanation = explain(image, path.name, networks, names, target, args)
        if args.sheet:
            sheet.append(explanation)
            continue
        picture = output.with_stem(f'{output.stem}-{number}') if len(paths) > 1 else output
        print(f'{plot_gradcam([explanation], picture)}  {explanation.title}')
    if sheet:
        print(plot_gradcam(sheet, output))
    if problems:
        raise UserError('; '.join(problems))


def find_images(names: Sequence[str], problems: List[str]) -> List[Path]:
    """Images by their files and folders; of a folder those that lie in it, in the order of their names.

    Args:
        names: Files and folders.
        problems: Takes a message for each folder without images.
    """
    paths = []
    for path in map(Path, names):
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in get_img_extensions(as_set=True))
            if not found:
                problems.append(f'{path}: a folder without images')
            paths += found
        else:
            paths.append(path)
    return paths


def read_image(path: Path) -> Image.Image:
    """Read an image as a whole.

    Raises:
        UserError: There is none, or it is damaged.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except Exception as e:  # PIL raises whatever its decoders raise
        reason = e.strerror if isinstance(e, OSError) and e.strerror else ' '.join(str(e).split())
        raise UserError(f'cannot read image {path}: {reason}') from e


def load_network(args: argparse.Namespace, device: torch.device) -> Network:
    """The network that the options name."""
    model = load_model(args)
    config = place_model(args, model, device)
    with blame('model input'):
        transform = create_transform(**config, crop_border_pixels=args.crop_border_pixels, is_training=False)
    return Network(args.model, model, config, transform)


def _check_same_classes(networks: Sequence[Network]) -> None:
    baseline, network = networks
    if baseline.model.num_classes != network.model.num_classes:
        raise UserError(f'--baseline-model {baseline.name}: has {baseline.model.num_classes} classes, {network.name} '
                        f'{network.model.num_classes}')


def _class_names(args: argparse.Namespace, network: Network, device: torch.device) -> List[str]:
    """Names of the classes of a network: of the dataset, if the options name one."""
    dataset = None
    if args.data_dir or args.dataset:
        dataset = create_validation_loader(args, network.config, device).dataset
    return class_names(network.model.num_classes, dataset)


def explain(
        image: Image.Image,
        title: str,
        networks: Sequence[Network],
        names: Sequence[str],
        target: Optional[int],
        args: argparse.Namespace,
) -> Explanation:
    """What networks make of an image, the last of them with the class that it predicts if no target is given.

    Args:
        image: Of any size and mode.
        title: What the image is called.
        networks: Networks with the same classes.
        names: Names of the classes [K].
        target: Class to explain, in [0, K), or None.
        args: Options as of `gradcam_parser`.

    Raises:
        UserError: A network has no such layer.
    """
    explained: List[NetworkMaps] = []
    given = target is not None
    for network in reversed(networks):
        mode = args.input_img_mode or ('RGB' if network.config['input_size'][0] == 3 else 'L')
        with blame('model input', ValueError):
            pixels = network.transform(image.convert(mode))  # [in_chans, H, W]
        device = next(network.model.parameters()).device
        has_attention = bool(attention_modules(network.model))
        with record_attention(network.model) if has_attention else nullcontext() as attention, \
                blame(f'--layers {" ".join(args.layers)}' if args.layers else f'--model {network.name}', ValueError):
            cam = grad_cam(network.model, pixels[None].to(device), target, args.layers)
        probabilities = cam.logits.softmax(1)[0].cpu()
        if target is None:
            target = int(cam.target)
        if network is networks[-1]:
            best = int(probabilities.argmax())
            title = f'{title}: {short_name(names[target])}, {probabilities[target]:.1%}'
            if not given:
                title += ' (predicted)'
            elif best != target:
                title += f' (predicted: {short_name(names[best])}, {probabilities[best]:.1%})'
        mean, std = (torch.tensor(network.config[key])[:, None, None] for key in ('mean', 'std'))
        explained.insert(0, NetworkMaps(
            f'{network.name}: {short_name(names[target])}, {probabilities[target]:.1%}',
            (pixels * std + mean).clamp(0, 1),
            {layer: activation[0].cpu() for layer, activation in cam.maps.items()},
            _curve(attention) if has_attention else None,
        ))
    return Explanation(title, explained)


def _curve(attention: Dict[str, torch.Tensor]) -> Dict[str, float]:
    """Normalised layer attention of each block, for one image."""
    return dict(zip(attention, normalize_attention(stack_attention(attention))[0].tolist()))
