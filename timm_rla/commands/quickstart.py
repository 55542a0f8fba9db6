"""`timm-rla quickstart`: train a small network on the handwritten digits of scikit-learn, from nothing to a curve."""
import argparse
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import List, Optional

from PIL import Image

from ..analysis.curves import plot_curves
from ..common.environment import describe_environment
from ..common.errors import UserError, blame
from ..common.extras import import_extra
from ..common.files import check_writable, write_csv
from ..common.options import OptionParser, parse
from ..common.recipes import recipes
from ..common.summary import read_summary
from ..train.options import train_parser
from ..train.run import train

__all__ = ['main', 'write_digits']

HELD_OUT = 360  # of 1,797 images


def quickstart_parser() -> OptionParser:
    parser = OptionParser(
        prog='timm-rla quickstart',
        description='Train a small network on handwritten digits. Other options are those of timm-rla train.')
    parser.add_argument('--config', metavar='FILE', help='recipe, by name or file; quickstart if not given')
    parser.add_argument('--output', default='output/quickstart', metavar='DIR', help='folder for images and runs')
    parser.add_argument('--result', metavar='FILE', help='write the result as CSV, too')
    return parser


def main(argv: Optional[List[str]] = None) -> None:
    """Command line."""
    args, options = quickstart_parser().parse_known_args(argv)

    output, digits = Path(args.output), Path(args.output, 'digits')
    config = args.config or str(recipes()['quickstart'])
    run_options = parse(
        train_parser(),
        ['--config', config, '--data-dir', str(digits), '--output', str(output), *options],
    )
    result_file = Path(args.result) if args.result else None
    _check(run_options, str(digits), output, result_file)
    write_digits(digits)
    start = time.perf_counter()
    run = train(run_options)
    seconds = time.perf_counter() - start
    curve = plot_curves([run], run / 'curves.png')
    rows = read_summary(run)
    result = dict(
        epochs=int(rows[-1]['epoch']) + 1,
        held_out=HELD_OUT,
        top1=round([row['eval_top1'] for row in rows if 'eval_top1' in row][-1], 2),
        seconds=round(seconds),
        **describe_environment(run_options.device),
    )
    if result_file:
        write_csv(result_file, result, [result.values()], '--result')
    print(f'Images      {digits}')
    print(f'Checkpoint  {run / "last.pth.tar"}')
    print(f'Curve       {curve}')
    print('Top-1       {top1:.2f} % of {held_out} held-out digits after {epochs} epochs, {seconds} s'.format(**result))


def _check(run_options: argparse.Namespace, digits: str, output: Path, result_file: Optional[Path]) -> None:
    """Complain of options that leave nothing to show, and of files that cannot be written, before the work."""
    if run_options.data:
        raise UserError(f'DIR {run_options.data}: not for quickstart, whose images are digits; timm-rla train takes it')
    if run_options.data_dir != digits or run_options.dataset or run_options.class_map:
        raise UserError('--data-dir, --dataset, --class-map: not for quickstart, whose images are digits; timm-rla '
                        'train takes them')
    if Path(run_options.experiment).parts[:1] == (Path(digits).name,):
        raise UserError(f'--experiment {run_options.experiment}: the images lie there')
    if run_options.val_split != 'validation':
        raise UserError(f"--val-split {run_options.val_split or repr('')}: must be validation, whose digits are held "
                        'out for what quickstart shows')
    if os.path.lexists(output) and not output.is_dir():
        raise UserError(f'--output {output}: is no folder')
    import_extra('matplotlib', 'quickstart')
    if result_file:
        if output.resolve() in result_file.resolve().parent.parents:
            raise UserError(f'--result {result_file}: must lie outside of the folders in --output {output}')
        check_writable(result_file, '--result')


def write_digits(root: Path) -> Path:
    """Write the 1,797 digits, 8 x 8 pixels each, as an image folder `root/{train,validation}/{0..9}/*.png`, once.

    Args:
        root: Folder to write. If it exists, it stays as it is.

    Returns:
        `root`.

    Raises:
        UserError: scikit-learn is not installed, or the folder cannot be written.
    """
    if root.exists():
        return root
    datasets = import_extra('sklearn.datasets', 'quickstart')
    model_selection = import_extra('sklearn.model_selection', 'quickstart')
    images, labels = datasets.load_digits().images, datasets.load_digits().target
    parts = model_selection.train_test_split(range(len(labels)), test_size=HELD_OUT, random_state=0, stratify=labels)

    temporary = root.with_name(f'{root.name}.{os.getpid()}')  # moved into place when it is whole
    try:
        with blame(str(root), OSError):
            for split, indices in zip(('train', 'validation'), parts):
                for index in indices:
                    path = temporary / split / str(labels[index]) / f'{index:04d}.png'
                    path.parent.mkdir(parents=True, exist_ok=True)
                    pixels = (images[index] * (255 / 16)).round().astype('uint8')  # 17 grey levels
                    Image.fromarray(pixels).save(path)
        with suppress(OSError):  # another process was faster
            temporary.rename(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return root
