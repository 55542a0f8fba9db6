"""The commands on generated images: training, evaluation beside pycocotools, prediction, export."""
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from small_detectors import COLORS, TRAIN

import timm_rla_cli as cli

pytest.importorskip('lightning')
pytest.importorskip('faster_coco_eval')

EXAMPLE = Path(__file__).parents[2] / 'examples' / 'finetune_detector.py'


def in_two_processes(*arguments):
    subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '-m', 'timm_rla',
         *arguments], check=True, env=dict(os.environ, OMP_NUM_THREADS='1'), timeout=300)


@pytest.mark.long
def test_two_processes(data, tmp_path):
    """The evaluation counts each image once, also where one process has more: it equals that of one process."""
    seven = shutil.copytree(data, tmp_path / 'seven')
    content = json.loads((data / 'annotations' / 'val.json').read_text())
    (seven / 'annotations' / 'val.json').write_text(json.dumps(dict(content, images=content['images'][:7], annotations=[
        entry for entry in content['annotations'] if entry['image_id'] != content['images'][7]['id']])))
    in_two_processes(*TRAIN, '--data-dir', str(seven), '--output', str(tmp_path), '--experiment', 'two',
                     '--iterations', '2')
    *_, row = csv.DictReader((tmp_path / 'two' / 'summary.csv').read_text().splitlines())
    command = ['detect', 'eval', '--checkpoint', str(tmp_path / 'two' / 'checkpoint-2.ckpt'), '--data-dir', str(seven),
               '--workers', '0', '--device', 'cpu', '--box-score-thresh', '0']
    in_two_processes(*command, '--json', str(tmp_path / 'n2.json'), '--results', str(tmp_path / 'r2.json'))
    assert cli.main([*command, '--json', str(tmp_path / 'n1.json'), '--results', str(tmp_path / 'r1.json')]) == 0
    numbers = json.loads((tmp_path / 'n1.json').read_text())
    assert json.loads((tmp_path / 'n2.json').read_text()) == numbers
    results = json.loads((tmp_path / 'r1.json').read_text())
    assert json.loads((tmp_path / 'r2.json').read_text()) == results
    assert {entry['image_id'] for entry in results} == set(range(10, 17))
    assert cli.main([*command[:-2], '--json', str(tmp_path / 'n.json')]) == 0
    numbers = json.loads((tmp_path / 'n.json').read_text())
    for name in 'map', 'map_50', 'mar_100':
        assert float(row[f'eval_{name}']) == pytest.approx(numbers[name], abs=1e-6)


def test_interrupted(data, tmp_path, monkeypatch, capsys):
    from timm_rla.detection.callbacks import Lines
    monkeypatch.setattr(Lines, 'on_train_batch_end', lambda self, *_: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
    try:
        assert cli.main([*TRAIN, '--data-dir', str(data), '--output', str(tmp_path), '--experiment', 'cut']) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.strip().splitlines()[-1] == 'timm-rla detect train: interrupted'


def test_what_ends_a_run_is_a_line(data, tmp_path, capsys):
    arguments = [*TRAIN, '--data-dir', str(data), '--output', str(tmp_path), '--experiment']
    assert cli.main([*arguments, 'far', '--lr', '1e12']) == 2
    assert ': the loss is ' in capsys.readouterr().err
    (tmp_path / 'taken').mkdir()
    (tmp_path / 'taken' / 'logs').touch()
    assert cli.main([*arguments, 'taken']) == 2
    assert str(tmp_path / 'taken') in capsys.readouterr().err


def test_nothing_to_evaluate(data, run, tmp_path, capsys):
    empty = shutil.copytree(data, tmp_path / 'empty')
    for path in (empty / 'images').iterdir():
        path.write_bytes(b'nothing')
    assert cli.main(['detect', 'eval', '--checkpoint', str(run / 'best.ckpt'), '--data-dir', str(empty), '--workers',
                     '0', '--device', 'cpu', '--skip-unreadable']) == 2
    assert 'no image of validation can be read' in capsys.readouterr().err


def test_python_is_told_before_it_trains(data):
    import lightning.pytorch as pl

    from timm_rla.detection import Detection, DetectionData, Schedule, fasterrcnn, read_folder
    train, val = read_folder(str(data))
    small = dict(backbone='resnet18', backbone_kwargs=dict(layers=(1, 1, 1, 1)), min_size=64, max_size=96)
    with pytest.raises(ValueError, match="box_score_thresh '2': checkpoints cannot have"):
        Detection(fasterrcnn(num_classes=3, **small, box_score_thresh='2'), train)
    module = Detection(fasterrcnn(num_classes=3, **small, bbox_reg_weights=(10., 10., 5., 5.), image_mean=None), train,
                       Schedule(iterations=1, lr=0.01))
    trainer = pl.Trainer(max_epochs=1, accelerator='cpu', logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match='max_steps -1: a detector trains for a number of iterations'):
        trainer.fit(module, DetectionData(train, val))


def test_example(data, tmp_path, monkeypatch):
    """examples/finetune_detector.py, with less to do; the commands take what it leaves."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['finetune_detector.py', str(data)])
    text = EXAMPLE.read_text()
    small = 'min_size=64, max_size=96, pyramid_channels=16, ' \
            'backbone_kwargs=dict(layers=(1, 1, 1, 1), channels=(16, 32, 64, 128))'
    for much, less in (('rla_resnet50', 'rla_resnet18'), ('pretrained=True', small), ('3000', '2')):
        assert much in text
        text = text.replace(much, less)
    found = {}
    exec(compile(text, str(EXAMPLE), 'exec'), found)
    checkpoint, = tmp_path.glob('lightning_logs/**/*.ckpt')
    assert cli.main(['detect', 'eval', '--checkpoint', str(checkpoint), '--data-dir', str(data), '--workers', '0',
                     '--json', 'n.json', '--device', 'cpu']) == 0
    assert json.loads(Path('n.json').read_text())['map'] == pytest.approx(found['module'].numbers['map'], abs=1e-6)


@pytest.mark.parametrize('iterations', ['2', '5'])
def test_the_end_is_evaluated(data, tmp_path, iterations):
    """Also of a run that is shorter than the interval of evaluations, or no multiple of it."""
    assert cli.main([*TRAIN, '--data-dir', str(data), '--output', str(tmp_path), '--experiment', 'short',
                     '--iterations', iterations]) == 0
    *_, last = (tmp_path / 'short' / 'summary.csv').read_text().splitlines()
    assert last.startswith(f'{iterations},')
    for name in 'best', f'checkpoint-{iterations}':
        assert (tmp_path / 'short' / f'{name}.ckpt').is_file()


@pytest.fixture(scope='module')
def fitted(data, tmp_path_factory):
    """Folder of a run that goes on until it knows its 8 images."""
    output = tmp_path_factory.mktemp('fitted')
    assert cli.main([*TRAIN, '--data-dir', str(data), '--output', str(output), '--experiment', 'fitted',
                     '--pyramid-channels', '32', '--iterations', '120', '--batch-size', '8', '--eval-interval', '120',
                     '--lr', '0.02', '--warmup-iterations', '10', '--milestones', '96', '--clip-grad', '10',
                     '--rpn-batch-size-per-image', '64', '--rpn-pre-nms-top-n-train', '200']) == 0
    return output / 'fitted'


@pytest.mark.long
def test_overfits(fitted):
    assert json.loads((fitted / 'metrics.json').read_text())['map_50'] > 0.9


def test_evaluation_of_a_run_is_that_of_pycocotools(data, run, tmp_path, capsys):
    coco = pytest.importorskip('pycocotools.coco')
    from pycocotools.cocoeval import COCOeval

    from timm_rla.detection.evaluation import NUMBERS
    assert cli.main(['detect', 'eval', '--checkpoint', str(run / 'best.ckpt'), '--data-dir', str(data),
                     '--workers', '0', '--json', str(tmp_path / 'n.json'), '--results', str(tmp_path / 'r.json'),
                     '--csv', str(tmp_path / 'n.csv'), '--box-score-thresh', '0.01', '--device', 'cpu']) == 0
    assert 'AP @[.5, .95], red' in capsys.readouterr().out
    truth = coco.COCO(str(data / 'annotations' / 'val.json'))
    evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / 'r.json')), 'bbox')
    evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    numbers = json.loads((tmp_path / 'n.json').read_text())
    expected = dict(zip(NUMBERS, evaluation.stats.tolist()))
    assert {name: numbers[name] for name in NUMBERS} == pytest.approx(expected, abs=1e-7)  # torchmetrics has float32
    assert (tmp_path / 'n.csv').read_text().startswith('number,class,value')


def test_prediction(data, run, tmp_path, capsys):
    shutil.copy(data / 'images' / '1.png', tmp_path / 'a.png')
    (tmp_path / 'b.png').write_bytes(b'nothing')
    Image.new('RGB', (3000, 1)).save(tmp_path / 'thin.png')  # nothing is left of it in the size of the network
    shutil.copy(data / 'images' / '1.png', tmp_path / f'{"x" * 251}.png')
    images = ['b.png', 'thin.png', f'{"x" * 251}.png', 'a.png']
    assert cli.main(['detect', 'predict', *(str(tmp_path / name) for name in images), '--device', 'cpu',
                     '--checkpoint', str(run / 'checkpoint-6.ckpt'), '--output', str(tmp_path / 'drawn'),
                     '--score-thresh', '0.05', '--json', str(tmp_path / 'found.json')]) == 2
    out, error = capsys.readouterr()
    assert 'cannot read image' in error and 'thin.png: ' in error and 'not drawn' in error and 'in 2 images' in out
    with Image.open(tmp_path / 'drawn' / '0004-a.png') as drawn:
        assert drawn.size == (96, 64)
    assert len(list((tmp_path / 'drawn').iterdir())) == 1
    found = json.loads((tmp_path / 'found.json').read_text())
    assert {entry['category_id'] for entry in found} <= set(COLORS)


@pytest.mark.parametrize('scale', [1, 20])
def test_boxes_and_names_are_drawn(scale):
    """In colours that differ by class, as wide as goes with the image; nothing below the threshold."""
    from timm_rla.detection.commands.predict import draw
    boxes = scale * torch.tensor([[10., 10., 60., 40.], [80., 30., 140., 90.], [20., 60., 70., 95.]])
    found = dict(boxes=boxes, labels=torch.tensor([1, 2, 1]), scores=torch.tensor([0.9, 0.5, 0.4]))
    pixels = torch.full((3, 100 * scale, 150 * scale), 0.5)
    detector = SimpleNamespace(names=['cell', '\u7d30\u80de'])  # the second in letters that few fonts have
    drawn = draw(pixels, found, detector, 0.5)
    grey = 128, 128, 128
    first, second = (drawn.getpixel((scale * x, scale * y)) for x, y in ((60, 40), (140, 90)))
    assert len({first, second, grey}) == 3
    changed = np.asarray(drawn) != 128
    assert not changed[59 * scale:97 * scale, 18 * scale:72 * scale].any()
    assert drawn.getpixel((30 * scale, 40 * scale - 5)) == (grey if scale == 1 else first)  # the line is wider
    colours = {color for _, color in drawn.crop([scale * x for x in (10, 10, 50, 25)]).getcolors(10 ** 6)}
    assert {first, grey} < colours  # the name, with its own background


def test_export(run, tmp_path):
    assert cli.main(['detect', 'export', str(tmp_path / 'a.pt'), '--checkpoint', str(run / 'best.ckpt')]) == 0
    _, found = torch.jit.load(tmp_path / 'a.pt')([torch.rand(3, 64, 96)])
    assert set(found[0]) == {'boxes', 'labels', 'scores'}
    assert cli.main(['detect', 'export', str(tmp_path / 'a.txt'), '--checkpoint', str(run / 'best.ckpt')]) == 2


@pytest.mark.long
def test_table_of_detectors(data, tmp_path, capsys, monkeypatch):
    """`timm-rla reproduce` trains them as it trains classifiers."""
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    own = tmp_path / 'own.yaml'
    shutil.copy(resources.files('timm_rla.reproduce.tables').joinpath('bccd.yaml'), own)
    command = ['reproduce', str(own), '--only', 'plain', '--seeds', '0', '--data-dir', str(data), '--output',
               str(tmp_path / 'out'), '--iterations', '2', '--device', 'cpu', '--min-size', '64', '--max-size', '96',
               '--backbone-kwargs', 'layers=(1,1,1,1)', 'channels=(16,32,64,128)']
    assert cli.main(command) == 0
    assert '[1/1] bccd-18-plain-seed0  mAP@[.5,.95] ' in capsys.readouterr().out
    assert '2 iterations instead of 800' in (tmp_path / 'out' / 'report.md').read_text()
    assert cli.main(command) == 0
    assert '1 of 1 runs are finished, 0 to go' in capsys.readouterr().out
    assert cli.main(['reproduce', 'bccd', *command[2:]]) == 2  # where they would stand in the report as BCCD
    assert 'table own.yaml, not bccd' in capsys.readouterr().err
    assert cli.main(['reproduce', 'bccd', *command[2:], '--output', str(tmp_path / 'other')]) == 2
    assert 'has 2 classes, bccd of this table 3' in capsys.readouterr().err and not (tmp_path / 'other').exists()


@pytest.mark.parametrize('arguments, message', [
    (['detect', 'fly'], 'fly: no such action'),
    *((['detect', 'eval', '--checkpoint', 'BEST', '--data-dir', 'DATA', '--device', device],
       f'--device {device}: detectors run on cpu, on cuda') for device in ('mps', 'meta', 'foo', 'cpu:1', 'cuda:x')),
    ([*TRAIN, '--data-dir', 'DATA', '--device', 'mps'], '--device mps: detectors run on cpu, on cuda'),
    (['detect', 'export', 'a.pt', '--checkpoint', 'BEST', '--device', 'foo'], '--device foo: detectors run on cpu'),
    ([*TRAIN, '--data-dir', 'DATA', '--opt', 'foo'], '--opt foo: no such optimizer'),
    ([*TRAIN, '--data-dir', 'DATA', '--output', 'RUNS', '--experiment', 'whole', '--resume', 'auto', '--opt', 'adamw'],
     'was trained with sgd'),
    ([*TRAIN, '--data-dir', 'DATA', '--experiment', '../x'], '--experiment ../x: must be the name of a folder inside'),
    ([*TRAIN, '--data-dir', 'DATA', '--warmup-iterations', '2', '--warmup-factor', '2'], '--warmup-factor 2.0: '),
    ([*TRAIN, '--data-dir', 'DATA', '--backbone-kwargs', 'layers=(1,1,1)'], '--backbone rla_resnet18: '),
    ([*TRAIN, '--data-dir', 'DATA', '--backbone-kwargs', 'in_chans=1'], 'in_chans=1: must be 3'),
    ([*TRAIN, '--data-dir', 'DATA', '--pretrained-path', 'nope'], '--pretrained-path nope: no such file'),
    ([*TRAIN, '--data-dir', 'DATA', '--train-annotations', 'a', '--train-images', 'b', '--val-annotations', 'c',
      '--val-images', 'd'], '--train-annotations and --val-annotations'),
    (['detect', 'eval', '--checkpoint', 'BEST', '--data-dir', 'DATA', '--val-annotations', 'VAL', '--val-images',
      'DATA'], 'one of the two, it or --val-annotations'),
    (['detect', 'eval', '--checkpoint', 'BEST', '--data-dir', 'DATA', '--json', 'a', '--results', 'a'],
     '--results a: the same file as a, which is written, too'),
    (['detect', 'eval', '--checkpoint', 'BEST', '--data-dir', 'DATA', '--csv', 'VAL'],
     'is what the command reads'),
    (['detect', 'predict', 'VAL', '--checkpoint', 'BEST', '--json', 'VAL'], 'is what the command reads'),
    (['detect', 'predict', 'VAL', '--checkpoint', 'BEST', '--json', 'BEST'], 'is what the command reads'),
    (['detect', 'export', 'a.pt', '--checkpoint', 'a.pt'], 'is what the command reads'),
    ([*TRAIN, '--data-dir', 'DATA', '--output', 'RUNS', '--experiment', 'whole', '--resume', 'no.ckpt'],
     'holds a run'),
    ([*TRAIN, '--data-dir', 'DATA', '--max-size', '1', '--min-size', '1'], 'the short one has none'),
    (['detect', 'eval', '--checkpoint', 'no.ckpt', '--data-dir', 'DATA'], '--checkpoint no.ckpt: no such file'),
    ([*TRAIN, '--data-dir', 'nowhere'], '--data-dir nowhere: no such folder'),
    ([*TRAIN, '--data-dir', 'DATA', '--backbone', 'resnet81'], "backbone 'resnet81': no such model"),
    ([*TRAIN, '--data-dir', 'DATA', '--output', 'RUNS', '--experiment', 'whole'], 'holds a run'),
    ([*TRAIN, '--data-dir', 'DATA', '--output', 'RUNS', '--experiment', 'whole', '--resume', 'auto', '--neck', 'c4'],
     "of a detector with neck 'fpn', not 'c4'"),
    ([*TRAIN, '--data-dir', 'DATA', '--iterations', '0'], '--iterations 0'),
    ([*TRAIN, '--data-dir', 'DATA', '--rpn-pre-nms-top-n-test', '200000'], 'must be from 1 to 100000'),
    ([*TRAIN, '--data-dir', 'DATA', '--roi-size', '1000'], '--roi-size 1000: must be from 1 to 999'),
    ([*TRAIN, '--data-dir', 'DATA', '--device', 'cuda:7'], '--device cuda:7'),
])
def test_bad_input(data, run, arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    known = {'DATA': str(data), 'RUNS': str(run.parent), 'BEST': str(run / 'best.ckpt'),
             'VAL': str(data / 'annotations' / 'val.json')}
    assert cli.main([known.get(argument, argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and 'Traceback' not in error
    assert not any(tmp_path.iterdir())
