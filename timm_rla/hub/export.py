"""A checkpoint of a training run as a folder that timm and transformers load."""
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import List, Optional

from PIL import Image
from safetensors import SafetensorError
from timm.models import save_for_hf

from ..common.checkpoint import read_checkpoint, weights_id
from ..common.errors import UserError, blame
from ..common.networks import Network, NetworkSpec, restore_network, trained_spec
from ..common.summary import SUMMARY
from ..common.trained import completed_epochs, training_options
from .card import build_card, measured_accuracy

__all__ = ['export']

_logger = logging.getLogger(__name__)

# Left out of the configuration: licence, paper and name are those of the source of a warm start, not of these weights,
# and the run was not validated at the size and crop for testing
FOREIGN = ('license', 'origin_url', 'paper_ids', 'paper_name', 'description', 'notes', 'tag', 'test_input_size',
           'test_crop_pct', 'test_pool_size')


def export(
        checkpoint: Path,
        directory: Path,
        use_ema: bool = False,
        dataset_name: Optional[str] = None,
        license_id: Optional[str] = None,
        repo_id: str = 'ORG/NAME',
) -> Path:
    """Write `model.safetensors`, `config.json`, a model card and the pictures of the run.

    The data configuration in `config.json` is the one that the run was validated with. It has no size or crop for
    testing, so that timm's `use_test_size` changes nothing.

    Args:
        checkpoint: Checkpoint of a training run.
        directory: Folder to write, new or empty. A new one is there as a whole or not at all.
        use_ema: Take the EMA weights.
        dataset_name: Name of the dataset for the card, instead of that in the checkpoint.
        license_id: Licence for the card.
        repo_id: Where the folder will lie on the Hub, for the card.

    Returns:
        `directory`.

    Raises:
        UserError: The checkpoint cannot be used, or the folder is not empty or cannot be written.
    """
    with blame(str(directory), OSError):  # a folder that may not be read
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise UserError(f'{directory}: not an empty folder')
    source = f'CHECKPOINT {checkpoint}'
    content = read_checkpoint(str(checkpoint), 'CHECKPOINT')
    spec = trained_spec(NetworkSpec(use_ema=use_ema), content, source)
    options = training_options(content, source)
    network = restore_network(spec, content, source)
    if network.image_mode:
        _logger.warning(f'{checkpoint}: trained on images of mode {network.image_mode}; the exported folder cannot say '
                        'so, others will read images by the number of channels')
    run_dir, epochs = checkpoint.parent, completed_epochs(content, source)
    epoch = epochs - 1 if epochs else None
    pictures = [] if options.get('frozen_from') else _pictures(checkpoint, use_ema)  # which are of the run
    card = build_card(
        network,
        options,
        epoch,
        measured_accuracy(options, content, epoch, run_dir, use_ema),
        repo_id,
        pictures,
        use_ema=use_ema,
        dataset_name=dataset_name,
        license_id=license_id,
    )
    with blame(str(directory), OSError, SafetensorError):  # the second on a full disk
        new = not directory.exists()
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent if new else directory, prefix='.export.') as temporary:
            folder = Path(temporary) / 'export'
            _save(network, folder, spec)
            for name in pictures:
                shutil.copy(run_dir / name, folder)
            card.save(folder / 'README.md')
            if new:
                os.rename(folder, directory)
            else:  # it may be the current folder, or a mounted one, and stays
                for path in list(folder.iterdir()):
                    os.rename(path, directory / path.name)
    return directory


def _pictures(checkpoint: Path, use_ema: bool) -> List[str]:
    """Pictures in the run's folder that are of these weights, and of all epochs of the run."""
    attention, curves = (checkpoint.parent / name for name in ('attention.png', 'curves.png'))
    pictures = []
    if attention.is_file():
        with blame(str(attention), OSError, ValueError), Image.open(attention) as image:
            source = image.info.get('Source')
        if source == weights_id(checkpoint, use_ema):
            pictures.append(attention.name)
        else:
            _logger.warning(f'{attention}: of other weights than {checkpoint}; left out')
    if curves.is_file():
        summary = checkpoint.parent / SUMMARY
        if not summary.is_file() or curves.stat().st_mtime >= summary.stat().st_mtime:
            pictures.append(curves.name)
        else:
            _logger.warning(f'{curves}: older than {summary.name}; left out')
    return pictures


def _save(network: Network, folder: Path, spec: NetworkSpec) -> None:
    """Weights and configuration, with timm's own function, whose configuration is then made that of the run."""
    save_for_hf(network.model, str(folder), model_args=dict(spec.model_kwargs), safe_serialization=True)
    path = folder / 'config.json'
    config = json.loads(path.read_text())

    channels, *size = network.data_config['input_size']
    args = config.setdefault('model_args', {})
    args.pop('num_classes', None)  # transformers gives it itself; it would be given twice
    args.pop('in_chans', None)
    if channels != 3:
        args['in_chans'] = channels
    if spec.global_pool:
        args['global_pool'] = spec.global_pool

    if network.label_names:
        config['label_names'] = network.label_names
    cfg = config['pretrained_cfg']
    if size != list(network.model.pretrained_cfg['input_size'][1:]):
        cfg['pool_size'] = None
    cfg.update(network.data_config, num_classes=network.model.num_classes)
    config['pretrained_cfg'] = {key: value for key, value in cfg.items() if key not in FOREIGN and value is not None}
    path.write_text(json.dumps(config, indent=2) + '\n')
    for file in folder.iterdir():  # safetensors makes files that nobody else may read
        file.chmod(path.stat().st_mode)
