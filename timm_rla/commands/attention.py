"""`timm-rla attention`: layer attention over a validation set (the paper's Figure 5), as pictures, CSV and table."""
from pathlib import Path
from typing import List, Optional

from ..analysis.attention import attention_modules
from ..analysis.attention_plot import plot_attention, plot_classes
from ..analysis.attention_statistics import format_table, measure_attention, write_statistics
from ..analysis.classes import class_names, find_class
from ..common.checkpoint import weights_id
from ..common.errors import UserError
from ..common.files import check_outputs
from ..common.idle import warn_of_idle_options
from ..common.image_folder import image_files
from ..common.networks import load_network
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


def attention_parser() -> OptionParser:
    parser = OptionParser(
        prog='timm-rla attention',
        description='Layer attention of each block over a dataset: mean and standard deviation, of all images and of '
                    'each class. Without --model the model and its input are those of --checkpoint. Under torchrun the '
                    'images are shared between the processes.',
    )
    add = parser.add_argument
    add_data_folder(add)
    add_data_options(add)
    add_model_options(add)
    add_precision_options(add)
    add('--class', dest='classes', nargs='+', metavar='CLASS',
        help='classes whose curves are drawn, by index or name; the ten that differ most from the mean if not given')
    add('--output', metavar='FILE', help='picture, PNG, SVG or PDF by its ending; beside it FILE-classes with a curve '
                                         'for each class and FILE.csv; attention.png beside --checkpoint if not given')
    return parser


def main(argv: Optional[List[str]] = None) -> None:
    """Command line."""
    args = attention_parser().parse_args(argv)
    beside = Path(args.checkpoint).parent if args.checkpoint else Path()  # where a model card looks for the picture
    output = Path(args.output) if args.output else beside / 'attention.png'
    check_picture(output)
    classes_output, table = output.with_stem(f'{output.stem}-classes'), output.with_suffix('.csv')
    outputs = [('--output', path) for path in (output, classes_output, table)]
    check_outputs(outputs, [args.checkpoint, args.class_map])
    place = placement(args)
    if place.primary:
        warn_of_idle_options(args, attention_parser())
    network = load_network(network_spec(args), verbose=place.primary)
    blocks = list(attention_modules(network.model))
    if not blocks:
        raise UserError(f'--model {network.name}: has no layer attention; networks named rla_* have')
    loader = validation_loader(args, network, place)
    check_outputs(outputs, image_files(loader.dataset))
    names = class_names(network.model.num_classes, loader.dataset, network.label_names)
    classes = [find_class(text, names) for text in args.classes] if args.classes else None
    moments = measure_attention(place.place_model(network.model), loader, place, args.log_freq)
    total = int(moments.count.sum())
    if not total:
        raise UserError(f'--split {args.split}: holds no images')
    if not place.primary:
        return

    title = f'{network.name}, {total:,} image{"s" if total > 1 else ""}'
    source = weights_id(Path(args.checkpoint), args.use_ema) if args.checkpoint else None
    plot_attention(moments, blocks, output, title=title, source=source)
    plot_classes(moments, blocks, names, classes_output, classes, title=title)
    write_statistics(moments, blocks, names, table)
    print(format_table(moments, blocks, names))
    for _, path in outputs:
        print(path)
