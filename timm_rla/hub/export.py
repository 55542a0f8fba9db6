"""`timm-rla export CHECKPOINT DIR`: a folder that timm and transformers load, and that `timm-rla push` sends."""
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch.nn as nn
from timm.data import resolve_data_config
from timm.utils import setup_default_logging

from .._timm import save_for_hf
from ..errors import UserError
from ..train.options import OptionParser
from ..train.setup import build_model, input_channels, load_weights, read_checkpoint
from .card import build_card

__all__ = ['add_options', 'export', 'main']

_logger = logging.getLogger(__name__)

PICTURES = ('attention.png', 'curves.png')  # taken along from the run's folder if they are there


def add_options(parser: OptionParser) -> None:
    """Options that export and push share."""
    add = parser.add_argument
    add('--use-ema', action='store_true', help='take the EMA weights')
    add('--dataset-name', metavar='NAME', help='dataset that the network was trained on, if the checkpoint has no name')
    add('--license', metavar='ID', help='licence of the weights, such as apache-2.0')


def main(argv: Optional[List[str]] = None) -> None:
    """Command line."""
    parser = OptionParser(prog='timm-rla export', description='Write a checkpoint as a folder for the Hub.')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='checkpoint of a training run')
    parser.add_argument('directory', metavar='DIR', help='folder to write, new or empty')
    add_options(parser)
    args = parser.parse_args(argv)
    setup_default_logging()
    for path in sorted(export(
            Path(args.checkpoint),
            Path(args.directory),
            use_ema=args.use_ema,
            dataset_name=args.dataset_name,
            license_id=args.license,
    ).iterdir()):
        print(f'{path.stat().st_size:>12,}  {path}')


def export(
        checkpoint: Path,
        directory: Path,
        use_ema: bool = False,
        dataset_name: Optional[str] = None,
        license_id: Optional[str] = None,
        repo_id: str = 'ORG/NAME',
) -> Path:
    """Write `model.safetensors`, `config.json`, a model card and the pictures of the run.

    Args:
        checkpoint: Checkpoint of a training run.
        directory: Folder to write, new or empty. It is there as a whole or not at all.
        use_ema: Take the EMA weights.
        dataset_name: Name of the dataset for the card, instead of that in the checkpoint.
        license_id: Licence for the card.
        repo_id: Where the folder will lie on the Hub, for the card.

    Returns:
        `directory`.

    Raises:
        UserError: The checkpoint cannot be used, or the folder is not empty.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f'{directory}: not an empty folder')
    content = read_checkpoint(str(checkpoint), 'CHECKPOINT')
    if 'args' not in content:
        raise UserError(f'CHECKPOINT {checkpoint}: not of a training run; it does not say which model it is')
    if use_ema and not content.get('state_dict_ema'):
        raise UserError(f'--use-ema: {checkpoint} holds no EMA weights')
    args = content['args']
    model = build_model(args, num_classes=args.num_classes, in_chans=input_channels(args), global_pool=args.gp)
    load_weights(model, content, f'CHECKPOINT {checkpoint}', use_ema=use_ema)
    data_config = resolve_data_config(vars(args), model=model)

    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f'.{directory.name}.') as temporary:
        folder = Path(temporary) / 'export'
        _save(model, folder, data_config, args.model_kwargs or {})
        pictures = [name for name in PICTURES if (checkpoint.parent / name).is_file()]
        for name in pictures:
            shutil.copy(checkpoint.parent / name, folder)
        card = build_card(
            model,
            content,
            checkpoint,
            data_config['input_size'],
            repo_id,
            pictures,
            use_ema=use_ema,
            dataset_name=dataset_name,
            license_id=license_id,
        )
        card.save(folder / 'README.md')
        if directory.exists():
            directory.rmdir()
        os.rename(folder, directory)
    return directory


def _save(model: nn.Module, folder: Path, data_config: Dict[str, Any], model_args: Dict[str, Any]) -> None:
    """Weights and configuration, with timm's own function."""
    keys = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct')
    pretrained_cfg = {key: data_config[key] for key in keys}
    pretrained_cfg.update(num_classes=model.num_classes, tag=None)
    if data_config['input_size'][1:] != tuple(model.pretrained_cfg['input_size'][1:]):
        pretrained_cfg.update(test_input_size=None, test_crop_pct=None, pool_size=None)
    # the source of a warm start has another licence, paper and name, and is not what these weights are
    for key in ('license', 'origin_url', 'paper_ids', 'paper_name', 'description', 'notes'):
        pretrained_cfg[key] = None
    save_for_hf(
        model,
        str(folder),
        model_config=dict(pretrained_cfg=pretrained_cfg),
        model_args=dict(model_args),
        safe_serialization=True,
    )
    path = folder / 'config.json'
    config = json.loads(path.read_text())
    # transformers gives num_classes itself; in the arguments it would be given twice
    for key in ('num_classes', 'in_chans'):
        config.get('model_args', {}).pop(key, None)
    if data_config['input_size'][0] != 3:
        config.setdefault('model_args', {})['in_chans'] = data_config['input_size'][0]
    config['pretrained_cfg'] = {key: value for key, value in config['pretrained_cfg'].items() if value is not None}
    path.write_text(json.dumps(config, indent=2) + '\n')
