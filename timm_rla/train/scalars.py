"""Scalars of each epoch for Weights & Biases and TensorBoard, named as in summary.csv."""
import argparse
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

from ..common.errors import blame
from ..common.extras import import_extra

__all__ = ['ScalarLog', 'open_scalar_logs']

ScalarLog = Callable[[Dict[str, float]], None]  # takes a row of summary.csv


def open_scalar_logs(args: argparse.Namespace, folder: Path, start_epoch: int) -> List[ScalarLog]:
    """The logs that the options ask for.

    Args:
        args: Options; as `config` of the run they go to Weights & Biases.
        folder: Folder of the run, which holds the files of TensorBoard.
        start_epoch: First epoch that will be logged; what an interrupted run has logged from there on is dropped.

    Raises:
        UserError: A library is missing, or the service refuses.
    """
    logs: List[ScalarLog] = []
    if args.log_wandb:
        logs.append(_wandb(args.wandb_project, folder.name, vars(args), args.wandb_tags, args.wandb_resume_id))
    if args.log_tensorboard:
        logs.append(_tensorboard(folder, start_epoch))
    return logs


def _wandb(project: str, name: str, config: Dict[str, Any], tags: Sequence[str], resume_id: str) -> ScalarLog:
    """As in timm's train.py: `resume_id` goes on with the run of that id."""
    wandb = import_extra('wandb', 'wandb')
    with blame('--log-wandb', wandb.Error, OSError, ValueError):
        run = wandb.init(
            project=project, name=name, config=config, tags=list(tags), resume='must' if resume_id else None,
            id=resume_id or None)
    return run.log


def _tensorboard(folder: Path, start_epoch: int) -> ScalarLog:
    import_extra('tensorboard', 'tensorboard')
    from torch.utils.tensorboard import SummaryWriter

    with blame(f'--log-tensorboard {folder}', OSError):
        writer = SummaryWriter(str(folder / 'tensorboard'), purge_step=start_epoch)

    def log(row: Dict[str, float]) -> None:
        for name, value in row.items():
            if name != 'epoch':
                writer.add_scalar(name.replace('_', '/', 1), value, row['epoch'])  # train/loss, in the section 'train'
        writer.flush()

    return log
