"""All that this package takes from timm's private parts, in one place."""
import shutil
from pathlib import Path

from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.models._hub import save_for_hf
from timm.utils import CheckpointSaver

__all__ = ['FeatureGetterNet', 'feature_take_indices', 'file_checkpoint', 'save_for_hf']


def file_checkpoint(saver: CheckpointSaver, path: Path, epoch: int, metric: float) -> None:
    """Let a checkpoint saver file a checkpoint that is on disk already as if it had just written it."""
    saver._save = lambda save_path, *args, **kwargs: shutil.copy2(path, save_path)
    try:
        saver.save_checkpoint(epoch, metric=metric)
    finally:
        del saver._save
