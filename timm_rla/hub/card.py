"""The model card: what is known of a trained network, and nothing else."""
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import models
from ..common.errors import printable
from ..common.networks import Network
from ..common.options import parse
from ..common.summary import is_row, read_summary
from ..train.options import train_parser

__all__ = ['build_card', 'measured_accuracy', 'recipe']

_CITATION = '''@misc{anonymous2020recurrent,
  title = {Recurrent Layer Attention Network},
  author = {Anonymous},
  year = {2020},
  note = {Submission to ICLR 2020, withdrawn},
  url = {https://openreview.net/forum?id=Bke5aJBKvH}
}'''
_MACHINE = {  # options that say where and how a run went, not what it trained
    'data', 'data_dir', 'output', 'experiment', 'resume', 'workers', 'device', 'local_rank', 'log_interval', 'pin_mem',
    'checkpoint_hist', 'device_modules', 'dataset_download', 'rank', 'world_size', 'distributed', 'prefetcher',
    'recovery_interval', 'validation_batch_size', 'log_wandb', 'wandb_project', 'wandb_tags', 'wandb_resume_id',
    'log_tensorboard',
}
_FILES = {'initial_checkpoint', 'pretrained_path', 'class_map'}  # options whose folders are nobody else's business
_PICTURE_TEXTS = {
    'attention.png': 'Layer attention over the blocks: mean and one standard deviation over the validation images',
    'curves.png': 'Loss and error over the epochs',
}
_ATTENTION = (
    'An image classification network with layer attention: an LSTM that runs beside the residual network scales the '
    'output of each block (Recurrent Layer Attention).'
)
_USE = """## Use

{needed}

```python
import timm

model = timm.create_model('hf-hub:{repo_id}', pretrained=True)
```

or

```python
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained('{repo_id}')
```"""


def recipe(options: Dict[str, Any]) -> Dict[str, Any]:
    """Options of a run that differ from their defaults and make a difference to what is trained."""
    defaults = vars(parse(train_parser(), []))
    found = {
        key: list(value) if isinstance(value, tuple) else value for key, value in options.items()
        if key in defaults and key not in _MACHINE and value != defaults[key]
    }
    found.update({key: Path(found[key]).name for key in _FILES & found.keys() if isinstance(found[key], str)})
    return found


def measured_accuracy(
        options: Dict[str, Any],
        checkpoint: Dict[str, Any],
        epoch: Optional[int],
        run_dir: Path,
        use_ema: bool,
) -> Optional[Dict[str, float]]:
    """What was measured on the weights of a checkpoint; None if it is not known, or of the other set of weights.

    It stands in the checkpoint itself. One of timm's script has the metric alone: the row of summary.csv with that one.

    Args:
        options: Options of the run.
        checkpoint: As from `read_checkpoint`.
        epoch: Index of the checkpoint's epoch.
        run_dir: Folder with summary.csv.
        use_ema: The weights are the EMA weights.
    """
    validated_ema = bool(options.get('model_ema')) and not options.get('model_ema_force_cpu')
    if validated_ema != use_ema:
        return None
    own = checkpoint.get('summary')
    rows = [own] if is_row(own) else [
        row for row in read_summary(run_dir) if checkpoint.get('metric') in row.values()]
    needed = ('epoch', 'eval_loss', 'eval_top1', 'eval_top5')
    return next((row for row in rows if all(isinstance(row.get(key), (int, float)) for key in needed)
                 and row['epoch'] == epoch), None)


def build_card(
        network: Network,
        options: Dict[str, Any],
        epoch: Optional[int],
        row: Optional[Dict[str, float]],
        repo_id: str,
        pictures: Sequence[str],
        use_ema: bool = False,
        dataset_name: Optional[str] = None,
        license_id: Optional[str] = None,
) -> ModelCard:
    """Card of a network that a training run has left.

    Args:
        network: The network, with its data configuration.
        options: Options of the run.
        epoch: Index of the last epoch that the weights were trained in, None if it is not known.
        row: Row of summary.csv of the weights, as from `measured_accuracy`.
        repo_id: Repository on the Hub.
        pictures: Names of the files that lie beside the card.
        use_ema: The weights are the EMA weights.
        dataset_name: Name of the dataset, instead of that in the options.
        license_id: Licence of the weights.
    """
    dataset = dataset_name or (options.get('dataset') or '').split('/', 1)[-1] or None  # an image folder has no name
    name = repo_id.split('/')[-1]
    has_attention = options['model'].startswith('rla_')
    trained = options.get('frozen_from')  # what `timm-rla freeze` has made it of
    own = options['model'].split('.')[0] in vars(models.registry)  # timm's own may be what is left of one
    needed = 'the package timm_rla' if own else 'timm'
    facts = {
        'Architecture': f'`{options["model"]}`',
        'Made of': f'`{trained["model"]}`, each layer attention held at its mean' if trained else None,
        'Parameters': f'{sum(p.numel() for p in network.model.parameters()):,}',
        'Input': ' x '.join(map(str, network.data_config['input_size'])),
        'Classes': _classes(network),
        'Dataset': dataset,
        'Epochs': None if epoch is None else epoch + 1,
        'Weights': 'exponential moving average' if use_ema or (trained or {}).get('use_ema') else None,
        'Licence': license_id,
    }
    parts = [
        f'# {name}',
        _ATTENTION if has_attention else 'An image classification network.',
        '\n'.join(f'- **{key}:** {value}' for key, value in facts.items() if value is not None),
        *([_accuracy(row)] if row is not None else []),
        *(f'![{_PICTURE_TEXTS[picture]}]({picture})' for picture in pictures),
        _USE.format(repo_id=repo_id, needed=f'With {needed} installed:'),
        '## Recipe\n\n```yaml\n' + yaml.safe_dump(recipe({**options, **(trained or {})}), sort_keys=False) + '```',
        *([f'## Citation\n\n```bibtex\n{_CITATION}\n```'] if has_attention or trained else []),
    ]
    header = _metadata(name, row, dataset, license_id).to_yaml()
    return ModelCard(f'---\n{header}\n---\n\n' + '\n\n'.join(parts) + '\n')


def _metadata(
        name: str,
        row: Optional[Dict[str, float]],
        dataset: Optional[str],
        license_id: Optional[str],
) -> ModelCardData:
    """What the Hub reads; accuracies only where it is known of which dataset they are."""
    results = None
    if row is not None and dataset is not None:
        results = [
            EvalResult(
                task_type='image-classification',
                dataset_type=dataset,
                dataset_name=dataset,
                metric_type=metric,
                metric_name=metric_name,
                metric_value=round(row[f'eval_{key}'], 3),
            ) for metric, metric_name, key in (('accuracy', 'Top-1', 'top1'), ('accuracy_top5', 'Top-5', 'top5'))
        ]
    return ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm_rla', 'recurrent-layer-attention'],
        license=license_id,
        datasets=[dataset] if dataset else None,
        model_name=name if results else None,
        eval_results=results,
    )


def _classes(network: Network) -> str:
    names = network.label_names or []
    shown = ', '.join(map(printable, names[:20])) + (', ...' if len(names) > 20 else '')
    return f'{network.model.num_classes}' + (f' ({shown})' if names else '')


def _accuracy(row: Dict[str, float]) -> str:
    return (
        f'## Accuracy\n\nMeasured on the validation split after epoch {int(row["epoch"]) + 1} of training.\n\n'
        f'| top-1 | top-5 | loss |\n|---|---|---|\n'
        f'| {row["eval_top1"]:.2f} % | {row["eval_top5"]:.2f} % | {row["eval_loss"]:.4f} |'
    )
