"""The model card: what is known of a trained network, and nothing else."""
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch.nn as nn
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..train.options import parse, train_parser
from ..train.resume import read_summary

__all__ = ['build_card']

CITATION = '''@misc{anonymous2020recurrent,
  title = {Recurrent Layer Attention Network},
  author = {Anonymous},
  year = {2020},
  note = {Submission to ICLR 2020, withdrawn},
  url = {https://openreview.net/forum?id=Bke5aJBKvH}
}'''
MACHINE = {  # options that say where and how a run went, not what it trained
    'data', 'data_dir', 'output', 'experiment', 'resume', 'workers', 'device', 'local_rank', 'log_interval', 'pin_mem',
    'checkpoint_hist', 'device_modules', 'dataset_download', 'rank', 'world_size', 'distributed', 'prefetcher',
}
PICTURE_TEXTS = {
    'attention.png': 'Layer attention over the blocks: mean and one standard deviation over the validation images',
    'curves.png': 'Loss and error over the epochs',
}


def recipe(options: Dict[str, Any]) -> Dict[str, Any]:
    """Options of a run that differ from their defaults and make a difference to what is trained."""
    defaults = vars(parse(train_parser(), []))
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in options.items()
        if key in defaults and key not in MACHINE and value != defaults[key]
    }


def measured_accuracy(content: Dict[str, Any], checkpoint: Path, use_ema: bool) -> Optional[Dict[str, float]]:
    """Row of summary.csv for a checkpoint; None if there is none, or if it is that of the other set of weights."""
    validated_ema = getattr(content['args'], 'model_ema', False) and \
        not getattr(content['args'], 'model_ema_force_cpu', False)
    if validated_ema != use_ema:
        return None
    for row in read_summary(checkpoint.parent):
        if row['epoch'] == content.get('epoch') and 'eval_top1' in row:
            return row
    return None


def build_card(
        model: nn.Module,
        content: Dict[str, Any],
        checkpoint: Path,
        input_size: Tuple[int, int, int],
        repo_id: str,
        pictures: List[str],
        use_ema: bool = False,
        dataset_name: Optional[str] = None,
        license_id: Optional[str] = None,
) -> ModelCard:
    """Card of a network that a training run has left.

    Args:
        model: The network.
        content: The checkpoint.
        checkpoint: Its file, beside which summary.csv lies.
        input_size: Channels, height and width.
        repo_id: Repository on the Hub.
        pictures: Files of the run's folder that go along.
        use_ema: The weights are the EMA weights.
        dataset_name: Name of the dataset, instead of that in the checkpoint.
        license_id: Licence of the weights.
    """
    args = content['args']
    dataset = dataset_name or args.dataset.split('/', 1)[-1] or None  # an image folder has no name
    row = measured_accuracy(content, checkpoint, use_ema)
    results = None
    if row is not None and dataset is not None:
        results = [
            EvalResult(
                task_type='image-classification', dataset_type=dataset, dataset_name=dataset,
                metric_type=metric, metric_name=name, metric_value=round(row[f'eval_{key}'], 3),
            ) for metric, name, key in (('accuracy', 'Top-1', 'top1'), ('accuracy_top5', 'Top-5', 'top5'))
        ]
    data = ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm_rla', 'recurrent-layer-attention'],
        license=license_id,
        datasets=[dataset] if dataset else None,
        model_name=repo_id.split('/')[-1] if results else None,
        eval_results=results,
    )

    facts = {
        'Architecture': f'`{args.model}`',
        'Parameters': f'{sum(p.numel() for p in model.parameters()):,}',
        'Input': ' x '.join(map(str, input_size)),
        'Classes': model.num_classes,
        'Dataset': dataset,
        'Epochs': content['epoch'] + 1 if 'epoch' in content else None,
        'Weights': 'exponential moving average' if use_ema else None,
        'Licence': license_id,
    }
    parts = [
        f'# {repo_id.split("/")[-1]}',
        'An image classification network with layer attention: an LSTM that runs beside the residual network scales '
        'the output of each block (Recurrent Layer Attention).' if args.model.startswith('rla_')
        else 'An image classification network.',
        '\n'.join(f'- **{key}:** {value}' for key, value in facts.items() if value is not None),
    ]
    if row is not None:
        parts.append(
            f'## Accuracy\n\nMeasured on the validation split after epoch {content["epoch"] + 1} of training.\n\n'
            f'| top-1 | top-5 | loss |\n|---|---|---|\n'
            f'| {row["eval_top1"]:.2f} % | {row["eval_top5"]:.2f} % | {row["eval_loss"]:.4f} |')
    for name in pictures:
        parts.append(f'![{PICTURE_TEXTS[name]}]({name})')
    parts.append(
        '## Use\n\nWith the package timm_rla installed:\n\n```python\nimport timm\n\n'
        f"model = timm.create_model('hf-hub:{repo_id}', pretrained=True)\n```\n\nor\n\n```python\n"
        'from transformers import AutoModelForImageClassification\n\n'
        f"model = AutoModelForImageClassification.from_pretrained('{repo_id}')\n```")
    parts.append('## Recipe\n\n```yaml\n' + yaml.safe_dump(recipe(vars(args)), sort_keys=False) + '```')
    if args.model.startswith('rla_'):
        parts.append(f'## Citation\n\n```bibtex\n{CITATION}\n```')
    return ModelCard(f'---\n{data.to_yaml()}\n---\n\n' + '\n\n'.join(parts) + '\n')
