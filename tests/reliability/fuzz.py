"""Damaged and hostile files for every reader that this package owns: each ends with a value or in one line."""
import argparse
import io
import json
import random
import string
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple

import timm
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from timm_rla.common.checkpoint import load_weights, read_checkpoint
from timm_rla.common.errors import UserError
from timm_rla.common.networks import NetworkSpec, trained_spec
from timm_rla.common.options import parse
from timm_rla.common.summary import read_summary, write_row
from timm_rla.common.trained import completed_epochs, training_options
from timm_rla.detection import fasterrcnn
from timm_rla.detection.checkpoint import EXPECTED, load_detector
from timm_rla.detection.coco import read_split
from timm_rla.reproduce.plan import load_table
from timm_rla.reproduce.results import Results
from timm_rla.train.folder import RunFolder
from timm_rla.train.options import train_parser

__all__ = ['READERS', 'Reader', 'check', 'try_inputs']

LONGEST = 1100  # characters of a message


class Reader(NamedTuple):
    """A reader and what it is given."""
    inputs: st.SearchStrategy
    read: Callable[[Path, Any], None]  # folder to work in, input


def check(read: Callable[[Path, Any], None], folder: Path, content: Any) -> None:
    """Read an input; a UserError of one bounded line is a good answer."""
    try:
        read(folder, content)
    except UserError as e:
        assert 0 < len(str(e)) <= LONGEST and '\n' not in str(e), str(e)


def try_inputs(reader: Reader, folder: Path, count: int, **kwargs: Any) -> None:
    """Read so many inputs; raises for the first that ends otherwise than `check` allows, made small by hypothesis."""
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck), **kwargs)
    @given(reader.inputs)
    def run(content: Any) -> None:
        check(reader.read, folder, content)

    run()


# Inputs --------------------------------------------------------------------------------------------------------------

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def damaged(draw: Any, whole: bytes) -> bytes:
    """A whole file with some bytes cut off, changed, repeated or put in."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        length = draw(st.integers(1, 40))
        kind = draw(st.sampled_from(['cut', 'change', 'repeat', 'insert', 'zero', 'end']))
        if kind == 'cut':
            del content[place:place + length]
        elif kind == 'change':
            content[place:place + length] = draw(st.binary(min_size=length, max_size=length))
        elif kind == 'repeat':
            content[place:place] = content[place:place + length]
        elif kind == 'insert':
            content[place:place] = draw(st.binary(max_size=length))
        elif kind == 'zero':
            content[place:place + length] = bytes(length)
        else:
            del content[place:]
    return bytes(content)


SUMMARY = ('epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n' + ''.join(
    f'{epoch},{2 - epoch / 9},{2.1 - epoch / 8},{10. * epoch},{12. * epoch},0.1\n' for epoch in range(6))).encode()
RECIPE = yaml.safe_dump(dict(
    model='rla_resnet20_cifar', lr=0.1, epochs=10, decay_milestones=[4, 8], sched='multistep', amp=True,
    model_kwargs=dict(hidden_dim=8), mean=[0.5, 0.5, 0.5])).encode()
MODEL = 'rla_resnet20_cifar'
SMALL = dict(layers=(1, 1, 1), channels=(2, 4, 8))
WEIGHTS = timm.create_model(MODEL, **SMALL).state_dict()


def _saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


CHECKPOINT = dict(
    state_dict=WEIGHTS, epoch=3, metric=1., args=argparse.Namespace(model=MODEL, model_kwargs=SMALL, num_classes=10))
OPTIONS = st.dictionaries(
    st.sampled_from([*vars(parse(train_parser(), [])), 'label_names', 'hidden_dim', 'checkpoint_path']), PLAIN,
    max_size=5)


ANNOTATIONS = json.dumps(dict(
    images=[dict(id=i, file_name='a.json', width=64, height=48) for i in (3, 4)],  # a file that is there
    annotations=[dict(id=i, image_id=3 + i % 2, category_id=1 + i % 2, bbox=[1.5, 2, 30, 20], area=600, iscrowd=0)
                 for i in range(4)],
    categories=[dict(id=1, name='cat'), dict(id=2, name='dog')])).encode()
CHANGES = st.lists(st.tuples(
    st.sampled_from(['images', 'annotations', 'categories']), st.integers(0, 3),
    st.sampled_from(['id', 'file_name', 'width', 'height', 'image_id', 'category_id', 'bbox', 'area', 'iscrowd',
                     'name']), PLAIN | st.lists(st.floats() | st.integers(), min_size=4, max_size=4)), max_size=4)


def _detector() -> Dict[str, Any]:
    model = fasterrcnn('rla_resnet18', 3, 'c4', backbone_kwargs=dict(layers=(1, 1, 1, 1), channels=(2, 2, 4, 4)))
    return dict(global_step=3, state_dict={f'detector.{name}': value for name, value in model.state_dict().items()},
                detector=dict(model.arguments, names=['cat', 'dog'], category_ids=[1, 2]))


DETECTOR = _detector()
DESCRIPTIONS = st.dictionaries(st.sampled_from(list(EXPECTED)), PLAIN | st.lists(st.integers(-5, 500), max_size=5),
                               max_size=3)


# Readers -------------------------------------------------------------------------------------------------------------

def _read_summary(folder: Path, content: bytes) -> None:
    (folder / 'summary.csv').write_bytes(content)
    rows = read_summary(folder)
    assert [row['epoch'] for row in rows] == sorted({row['epoch'] for row in rows})
    write_row(folder, dict(epoch=len(rows) and int(rows[-1]['epoch']) + 1, train_loss=1.))
    assert len(read_summary(folder)) == len(rows) + 1


def _read_recipe(folder: Path, content: bytes) -> None:
    (folder / 'recipe.yaml').write_bytes(content)
    parse(train_parser(), ['--config', str(folder / 'recipe.yaml')])


def _read_mapping(folder: Path, content: Any) -> None:
    (folder / 'recipe.yaml').write_text(yaml.safe_dump(content), encoding='utf-8', errors='replace')
    parse(train_parser(), ['--config', str(folder / 'recipe.yaml')])


def _read_table(folder: Path, content: bytes) -> None:
    (folder / 'table.yaml').write_bytes(content)
    Results(folder, load_table('table1', [20], ['cifar10'], ['rla']), None, [])


def _read_checkpoint(folder: Path, content: bytes) -> None:
    path = folder / 'c.pth.tar'
    path.write_bytes(content)
    checkpoint = read_checkpoint(str(path), '--checkpoint')
    completed_epochs(checkpoint, '--checkpoint')
    if training_options(checkpoint, '--checkpoint'):
        spec = trained_spec(NetworkSpec(), checkpoint, '--checkpoint')
        assert set(spec.model_kwargs) <= {*SMALL, 'bn_eps'} or spec.model_kwargs
    model = timm.create_model(MODEL, **SMALL)
    load_weights(model, checkpoint, '--checkpoint')


def _read_options(folder: Path, options: Dict[str, Any]) -> None:
    namespace = argparse.Namespace(**{**vars(CHECKPOINT['args']), **options})
    checkpoint = dict(CHECKPOINT, args=namespace)
    if training_options(checkpoint, '--checkpoint'):
        trained_spec(NetworkSpec(), checkpoint, '--checkpoint')


def _read_folder(folder: Path, content: bytes) -> None:
    for path in folder.glob('*.pth*'):
        path.unlink()
    for name, seed in (('last.pth.tar', 0), ('checkpoint-2.pth.tar', 1), ('recovery-4-7.pth.tar', 2)):
        cut = random.Random(content[:8] + bytes([seed])).choice([None, len(content) // 2])
        (folder / name).write_bytes(content[:cut])
    (folder / 'recovery-4-7-0.pth').write_bytes(content[:100])
    (folder / 'summary.csv').unlink(missing_ok=True)
    found = RunFolder(folder).find_checkpoint('auto')
    if found is not None:
        read_checkpoint(str(found), '--resume')
        state = RunFolder(folder).resume_state(found, {}, 4)
        assert isinstance(state, dict)


def _read_annotations(folder: Path, content: bytes) -> None:
    (folder / 'a.json').write_bytes(content)
    split = read_split(folder / 'a.json', folder, '--train-annotations', skip_missing=True)
    assert any(len(entry.labels) for entry in split.images) and len(split.names) == len(split.category_ids)


def _read_changed_annotations(folder: Path, changes: Any) -> None:
    content = json.loads(ANNOTATIONS)
    for kind, place, key, value in changes:
        entries = content[kind]
        entries[place % len(entries)][key] = value
    _read_annotations(folder, json.dumps(content).encode())


def _read_detector(folder: Path, content: bytes) -> None:
    (folder / 'd.ckpt').write_bytes(content)
    detector = load_detector(str(folder / 'd.ckpt'))
    assert len(detector.names) == len(detector.category_ids)


def _read_description(folder: Path, changes: Dict[str, Any]) -> None:
    _read_detector(folder, _saved(dict(DETECTOR, detector={**DETECTOR['detector'], **changes})))


NAMES = st.text(string.ascii_lowercase + '_', max_size=12) | st.sampled_from(list(vars(parse(train_parser(), []))))
READERS: Dict[str, Reader] = {
    'summary.csv': Reader(damaged(SUMMARY) | st.binary(max_size=300), _read_summary),
    'recipe, damaged': Reader(damaged(RECIPE) | st.binary(max_size=200), _read_recipe),
    'recipe, other values': Reader(st.dictionaries(NAMES, PLAIN, max_size=5) | PLAIN, _read_mapping),
    'table.yaml': Reader(damaged(yaml.safe_dump(dict(table='table1', epochs=None, options=[])).encode()), _read_table),
    'checkpoint, damaged': Reader(damaged(_saved(CHECKPOINT)), _read_checkpoint),
    'checkpoint, other options': Reader(OPTIONS, _read_options),
    'annotations, damaged': Reader(damaged(ANNOTATIONS), _read_annotations),
    'annotations, other values': Reader(CHANGES, _read_changed_annotations),
    'detector, damaged': Reader(damaged(_saved(DETECTOR)), _read_detector),
    'detector, other description': Reader(DESCRIPTIONS, _read_description),
    'folder of a run': Reader(damaged(_saved(CHECKPOINT)), _read_folder),
}
