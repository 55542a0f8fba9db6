"""`timm-rla predict IMAGE...`: the most probable classes of images."""
import json
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
from torch.utils.data import DataLoader, Dataset

from ..analysis.classes import class_names
from ..common.device import Placement, place
from ..common.errors import UserError, printable
from ..common.files import check_outputs, write_csv
from ..common.images import ImageNetwork, find_images, prepare_network, read_image
from ..common.networks import load_network
from ..common.options import OptionParser, add_model_options, network_spec
from ..common.progress import Progress
from ..common.table import format_columns

__all__ = ['main']


def predict_parser() -> OptionParser:
    parser = OptionParser(
        prog='timm-rla predict',
        description='The most probable classes of images and their probabilities. The network is that of --checkpoint, '
                    'or --model: hf-hub:ORG/NAME, or local-dir:DIR for an exported folder.',
    )
    add = parser.add_argument
    add('images', nargs='+', metavar='IMAGE', help='image, or a folder with images in it or in its folders')
    add('--topk', type=int, default=5, metavar='N', help='classes shown for each image')
    add('--csv', metavar='FILE', help='write a row for each image and class')
    add('--json', action='store_true', help='print JSON instead of a table')
    add('-b', '--batch-size', type=int, default=64, metavar='N', help='batch size')
    add('-j', '--workers', type=int, default=0, metavar='N', help='processes that read images')
    add('--log-freq', type=int, default=10, metavar='N', help='batches between log lines')
    add('--input-img-mode', metavar='MODE', help='image mode, by the number of input channels if not given')
    add_model_options(add)
    return parser


def main(argv: Optional[List[str]] = None) -> None:
    """Command line."""
    args = predict_parser().parse_args(argv)
    paths, problems = find_images(args.images, recursive=True)
    if args.csv:
        check_outputs([('--csv', Path(args.csv))], [*paths, args.checkpoint])
    if not paths:
        raise UserError('; '.join(problems))
    placement = place(args.device)
    network = load_network(network_spec(args).or_hosted(), verbose=True)
    placement.place_model(network.model)
    names = class_names(network.model.num_classes, None, network.label_names)
    prepared = prepare_network(network, args.crop_border_pixels)
    rows: List[Dict[str, Any]] = []
    for path, found in _predict(prepared, paths, args, placement):
        if isinstance(found, str):
            problems.append(found)  # said at the end, where it is seen, when all other images are done
            continue
        values, indices = found.topk(min(args.topk, len(names)))
        rows.append(dict(image=str(path), predictions=[
            dict(index=index, name=names[index], probability=round(value, 6))
            for value, index in zip(values.tolist(), indices.tolist())
        ]))
    if args.csv:
        _write_csv(rows, Path(args.csv))
    unicode = 'utf' in (sys.stdout.encoding or '').lower()
    print(json.dumps(rows, indent=1, ensure_ascii=not unicode) if args.json else _format(rows))
    if problems:
        raise UserError('; '.join(problems))


class _Images(Dataset):
    """Input of a network for each file, or what is wrong with the file."""

    def __init__(self, network: ImageNetwork, paths: Sequence[Path], mode: Optional[str]):
        self.network = network._replace(model=None)  # nothing for the processes that read
        self.paths = paths
        self.mode = mode

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Union[torch.Tensor, str]:
        try:
            return self.network.pixels(read_image(self.paths[index]), self.mode)
        except UserError as e:
            name = printable(str(self.paths[index]))
            return str(e) if name in str(e) else f'{name}: {e}'


def _predict(
        network: ImageNetwork,
        paths: Sequence[Path],
        args: Any,
        placement: Placement,
) -> Iterator[Tuple[Path, Union[torch.Tensor, str]]]:
    """Probabilities of the classes [K] for each file, or what is wrong with it."""
    images = _Images(network, paths, args.input_img_mode)
    loader = DataLoader(images, args.batch_size, num_workers=args.workers, collate_fn=list)
    network.model.eval()
    done = 0
    with torch.inference_mode(), Progress('Predict', len(loader), args.log_freq) as progress:
        for batch in loader:
            whole = [pixels for pixels in batch if not isinstance(pixels, str)]
            probabilities = iter(())
            if whole:
                inputs, _ = placement.place_batch(torch.stack(whole), torch.empty(0))
                with placement.blame(inputs):
                    probabilities = iter(network.model(inputs).softmax(1).cpu())
            for entry in batch:
                yield paths[done], entry if isinstance(entry, str) else next(probabilities)
                done += 1
            progress.update(len(batch))


def _format(rows: Sequence[Dict[str, Any]]) -> str:
    if not rows:
        return ''
    return format_columns([
        (row['image'], *(f'{entry["name"]} {entry["probability"]:.1%}' for entry in row['predictions'])) for row in rows
    ], left=len(rows[0]['predictions']) + 1)


def _write_csv(rows: Sequence[Dict[str, Any]], path: Path) -> None:
    columns = ('index', 'name', 'probability')
    write_csv(path, ['image', 'rank', *columns], (
        [row['image'], rank, *(entry[column] for column in columns)]
        for row in rows for rank, entry in enumerate(row['predictions'], start=1)), '--csv')
