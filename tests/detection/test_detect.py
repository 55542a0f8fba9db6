"""The commands on generated images: training, going on, evaluation beside pycocotools, prediction, export."""
import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image, ImageDraw

import timm_rla_cli as cli

pytest.importorskip('lightning')
pytest.importorskip('faster_coco_eval')

EXAMPLE = Path(__file__).parents[2] / 'examples' / 'finetune_detector.py'
COLORS = {3: 'red', 8: 'blue'}
TRAIN = ['detect', 'train', '--backbone', 'rla_resnet18', '--backbone-kwargs', 'layers=(1,1,1,1)',
         'channels=(16,32,64,128)', '--no-frozen-bn', '--min-size', '64', '--max-size', '96',
         '--pyramid-channels', '16', '--anchor-sizes', '8', '16', '24', '32', '48',
         '--rpn-post-nms-top-n-train', '40', '--rpn-post-nms-top-n-test', '40', '--box-batch-size-per-image', '16',
         '--iterations', '6', '--eval-interval', '4', '--checkpoint-interval', '2', '--lr', '0.01', '--workers', '0',
         '--device', 'cpu', '--seed', '1']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Coloured boxes on grey, in both orientations; categories with gaps; an image without objects."""
    root = tmp_path_factory.mktemp('shapes')
    (root / 'annotations').mkdir(), (root / 'images').mkdir()
    generator = torch.Generator().manual_seed(0)
    images, annotations = [], []
    for i in range(8):
        width, height = (96, 64) if i % 2 else (64, 96)
        image = Image.new('RGB', (width, height), 'grey')
        for side, category in enumerate(COLORS if i else ()):
            w, h = [int(torch.randint(14, 26, (), generator=generator)) for _ in range(2)]
            x = side * width // 2 + int(torch.randint(width // 2 - w, (), generator=generator))
            y = int(torch.randint(height - h, (), generator=generator))
            ImageDraw.Draw(image).rectangle((x, y, x + w - 1, y + h - 1), fill=COLORS[category])
            annotations.append(dict(id=len(annotations) + 1, image_id=i + 10, category_id=category,
                                    bbox=[x, y, w, h], area=w * h, iscrowd=0))
        image.save(root / 'images' / f'{i}.png')
        images.append(dict(id=i + 10, file_name=f'{i}.png', width=width, height=height))
    content = dict(images=images, annotations=annotations,
                   categories=[dict(id=number, name=name) for number, name in COLORS.items()])
    for split in 'train', 'val':
        (root / 'annotations' / f'{split}.json').write_text(json.dumps(content))
    return root


@pytest.fixture(scope='module')
def run(data, tmp_path_factory):
    """Folder of a whole run."""
    output = tmp_path_factory.mktemp('runs')
    assert cli.main([*TRAIN, '--data-dir', str(data), '--output', str(output), '--experiment', 'whole']) == 0
    return output / 'whole'


def weights(folder):
    return torch.load(folder / 'checkpoint-6.ckpt', weights_only=True)['state_dict']


def iteration(checkpoint):
    return torch.load(checkpoint, weights_only=True)['global_step']


def killed_behind(last, monkeypatch, arguments):
    """A run that dies as soon as it has written the checkpoint of an iteration."""
    from timm_rla.detection.callbacks import Checkpoints
    save = Checkpoints._save

    def save_and_die(self, trainer):
        save(self, trainer)
        if trainer.global_step == last:
            raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, '_save', save_and_die)
        with pytest.raises(ZeroDivisionError):
            cli.main(arguments)


def assert_same_run(a, b):
    found, expected = weights(a), weights(b)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert (a / 'summary.csv').read_text() == (b / 'summary.csv').read_text()
    assert iteration(a / 'best.ckpt') == iteration(b / 'best.ckpt')


@pytest.mark.parametrize('last', [2, 4])
def test_going_on_is_bit_for_bit_the_whole_run(data, run, tmp_path, monkeypatch, last):
    """A run that is killed behind a checkpoint, before or at an evaluation; another number of workers."""
    arguments = [*TRAIN, '--data-dir', str(data), '--output', str(tmp_path), '--experiment', 'cut']
    killed_behind(last, monkeypatch, arguments)
    assert (tmp_path / 'cut' / f'checkpoint-{last}.ckpt').is_file()
    assert cli.main([*arguments, '--resume', 'auto', '--workers', '1']) == 0
    assert_same_run(tmp_path / 'cut', run)


def test_going_on_with_averages_and_accumulation(data, tmp_path, monkeypatch):
    arguments = [*TRAIN, '--data-dir', str(data), '--output', str(tmp_path), '--model-ema', '--model-ema-decay', '0.5',
                 '--accumulate', '2', '--experiment']
    assert cli.main([*arguments, 'whole']) == 0
    killed_behind(2, monkeypatch, [*arguments, 'cut'])
    assert cli.main([*arguments, 'cut', '--resume', 'auto']) == 0
    assert_same_run(tmp_path / 'cut', tmp_path / 'whole')
    raw = torch.load(tmp_path / 'cut' / 'checkpoint-6.ckpt', weights_only=True)['current_model_state']
    averaged = weights(tmp_path / 'cut')
    assert any(not torch.equal(raw[key], averaged[key]) for key in averaged)


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


def test_a_finished_run_can_be_lengthened(data, run, tmp_path, caplog):
    arguments = [*TRAIN, '--data-dir', str(data), '--output', str(tmp_path), '--experiment', 'longer']
    assert cli.main([*arguments, '--iterations', '4']) == 0
    assert cli.main([*arguments, '--resume', 'auto']) == 0
    assert_same_run(tmp_path / 'longer', run)
    assert 'Nothing is left to do' not in caplog.text
    assert cli.main([*arguments, '--resume', 'auto']) == 0
    assert 'Nothing is left to do: ' in caplog.text
    assert_same_run(tmp_path / 'longer', run)


@pytest.mark.parametrize('before, after', [('1', '2'), ('2', '1')])
def test_another_accumulation(data, tmp_path, monkeypatch, before, after):
    """As where half of the GPUs go on: evaluations and checkpoints come at the same iterations, to the last."""
    arguments = [*TRAIN, '--data-dir', str(data), '--output', str(tmp_path), '--experiment', 'cut', '--accumulate']
    killed_behind(2, monkeypatch, [*arguments, before])
    assert cli.main([*arguments, after, '--resume', 'auto']) == 0
    rows = list(csv.DictReader((tmp_path / 'cut' / 'summary.csv').read_text().splitlines()))
    assert [row['epoch'] for row in rows] == ['4', '6']
    assert iteration(tmp_path / 'cut' / 'checkpoint-6.ckpt') == 6


def test_goes_on_with_the_options_of_the_command(data, tmp_path, monkeypatch):
    """What the log says holds; a schedule without warm-up takes the place of one with it."""
    arguments = [*TRAIN, '--data-dir', str(data), '--output', str(tmp_path), '--experiment', 'cut']
    killed_behind(2, monkeypatch, [*arguments, '--warmup-iterations', '3'])
    assert cli.main([*arguments, '--resume', 'auto', '--lr', '0.004', '--milestones', '5', '--weight-decay', '0.01',
                     '--momentum', '0.5']) == 0
    optimizer, = torch.load(tmp_path / 'cut' / 'checkpoint-6.ckpt', weights_only=True)['optimizer_states']
    group, = optimizer['param_groups']
    assert (group['lr'], group['weight_decay'], group['momentum']) == (pytest.approx(0.0004), 0.01, 0.5)
    rows = list(csv.DictReader((tmp_path / 'cut' / 'summary.csv').read_text().splitlines()))
    assert [float(row['lr']) for row in rows] == pytest.approx([0.004, 0.0004])


def test_going_on_from_the_best_of_a_finished_run(data, tmp_path, monkeypatch):
    """Which was evaluated, and written, behind the last iteration."""
    from timm_rla.detection.evaluation import CocoMetric
    numbers, calls = CocoMetric.numbers, []

    def better(self):
        calls.append(1)
        return dict(numbers(self), map=len(calls) / 10)

    monkeypatch.setattr(CocoMetric, 'numbers', better)
    arguments = [*TRAIN, '--data-dir', str(data), '--output', str(tmp_path), '--experiment']
    assert cli.main([*arguments, 'short', '--iterations', '5']) == 0
    best = tmp_path / 'short' / 'best.ckpt'
    assert iteration(best) == 5
    assert cli.main([*arguments, 'short', '--iterations', '7', '--resume', str(best)]) == 0
    assert iteration(tmp_path / 'short' / 'checkpoint-7.ckpt') == 7
    assert cli.main([*arguments, 'whole', '--iterations', '7']) == 0
    found, expected = (torch.load(tmp_path / name / 'checkpoint-7.ckpt', weights_only=True)['state_dict']
                       for name in ('short', 'whole'))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_steps_of_the_logs_go_on(data, tmp_path, monkeypatch):
    """Behind each checkpoint that a run goes on from."""
    arguments = [*TRAIN, '--data-dir', str(data), '--output', str(tmp_path), '--eval-interval', '5', '--log-interval',
                 '1', '--checkpoint-interval', '1', '--experiment']
    assert cli.main([*arguments, 'whole']) == 0
    killed_behind(2, monkeypatch, [*arguments, 'cut'])
    killed_behind(3, monkeypatch, [*arguments, 'cut', '--resume', 'auto'])
    assert cli.main([*arguments, 'cut', '--resume', 'auto']) == 0

    def losses(folder):
        rows = [row for path in sorted(folder.glob('logs/version_*/metrics.csv'))
                for row in csv.DictReader(path.read_text().splitlines()) if row.get('loss')]
        return {int(row['step']): row['loss'] for row in rows}

    found, expected = losses(tmp_path / 'cut'), losses(tmp_path / 'whole')
    assert len(expected) == 6 and found and all(expected[step] == loss for step, loss in found.items())
    assert max(found) == max(expected)


def test_going_on_with_an_optimizer_that_counts(data, tmp_path, monkeypatch):
    """Its counter lies among the options, and is none of them; weights are first mixed in the twelfth iteration."""
    arguments = [*TRAIN, '--data-dir', str(data), '--output', str(tmp_path), '--opt', 'lookahead_sgd', '--iterations',
                 '13', '--eval-interval', '13', '--experiment']
    assert cli.main([*arguments, 'whole']) == 0
    killed_behind(2, monkeypatch, [*arguments, 'cut'])
    assert cli.main([*arguments, 'cut', '--resume', 'auto']) == 0
    found, expected = (torch.load(tmp_path / name / 'checkpoint-13.ckpt', weights_only=True)['state_dict']
                       for name in ('cut', 'whole'))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_another_detector_is_refused(data, tmp_path, monkeypatch, capsys):
    """Also where the command no longer has what the checkpoint of the backbone said."""
    trained = dict(model='rla_resnet18', model_kwargs=dict(layers=(1, 1, 1, 1), channels=(16, 32, 64, 128)),
                   mean=[.5, .5, .5], std=[.5, .5, .5])
    torch.save(dict(state_dict=timm.create_model('rla_resnet18', **trained['model_kwargs']).state_dict(),
                    args=argparse.Namespace(**trained)), tmp_path / 'classifier.pth.tar')
    arguments = [*TRAIN, '--data-dir', str(data), '--output', str(tmp_path), '--experiment', 'cut']
    backbone = ['--pretrained-path', str(tmp_path / 'classifier.pth.tar'), '--trainable-layers', '5']
    killed_behind(2, monkeypatch, [*arguments, *backbone])
    assert cli.main([*arguments, '--resume', 'auto']) == 2
    assert 'of a detector with image_' in capsys.readouterr().err
    assert cli.main([*arguments, *backbone[:2], '--trainable-layers', '2', '--resume', 'auto']) == 2
    assert '--trainable-layers: --resume' in capsys.readouterr().err


def test_goes_on_with_its_own_args(data, tmp_path, monkeypatch, capsys):
    arguments = [*TRAIN, '--data-dir', str(data), '--output', str(tmp_path), '--experiment', 'cut', '--model-ema']
    killed_behind(2, monkeypatch, arguments)
    config = ['detect', 'train', '--config', str(tmp_path / 'cut' / 'args.yaml'), '--resume', 'auto']
    assert cli.main([*config, '--iterations', '3']) == 0
    assert cli.main([*arguments[:-1], '--resume', 'auto']) == 2
    assert '--model-ema: not given, --resume' in capsys.readouterr().err


def test_interrupted(data, tmp_path, monkeypatch, capsys):
    from timm_rla.detection.callbacks import Lines
    monkeypatch.setattr(Lines, 'on_train_batch_end', lambda self, *_: signal.raise_signal(signal.SIGINT))
    assert cli.main([*TRAIN, '--data-dir', str(data), '--output', str(tmp_path), '--experiment', 'cut']) == 130
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


def test_asked_to_stop(data, run, tmp_path, monkeypatch):
    from timm_rla.detection.callbacks import Lines
    monkeypatch.setattr(Lines, 'on_train_start', lambda self, trainer, module: signal.raise_signal(signal.SIGTERM))
    arguments = [*TRAIN, '--data-dir', str(data), '--output', str(tmp_path), '--experiment', 'cut']
    assert cli.main(arguments) == 75
    assert (tmp_path / 'cut' / 'checkpoint-1.ckpt').is_file()
    monkeypatch.undo()
    assert cli.main([*arguments, '--resume', 'auto']) == 0
    assert all(torch.equal(a, b) for a, b in zip(weights(tmp_path / 'cut').values(), weights(run).values()))


def test_asked_to_stop_behind_an_evaluation(data, run, tmp_path, monkeypatch, capsys):
    """Lightning looks for signals there before it calls a callback; it is the same to who asks."""
    from timm_rla.detection.callbacks import Lines
    monkeypatch.setattr(Lines, 'on_validation_end', lambda self, trainer, module: signal.raise_signal(signal.SIGTERM))
    arguments = [*TRAIN, '--data-dir', str(data), '--output', str(tmp_path), '--experiment', 'cut']
    assert cli.main(arguments) == 75
    assert 'stopped after 4 iterations; --resume auto goes on' in capsys.readouterr().err
    monkeypatch.undo()
    assert cli.main([*arguments, '--resume', 'auto']) == 0
    assert_same_run(tmp_path / 'cut', run)


def test_what_has_been_left_is_gone(data, run, tmp_path, monkeypatch, caplog):
    """Who goes back in a run does not come to its later iterations again, nor to the best of them."""
    from timm_rla.detection.callbacks import Lines
    folder = tmp_path / 'back'
    shutil.copytree(run, folder)
    shutil.copy(folder / 'checkpoint-6.ckpt', folder / 'best.ckpt')
    arguments = [*TRAIN, '--data-dir', str(data), '--output', str(tmp_path), '--experiment', 'back', '--seed', '7']
    with monkeypatch.context() as patch:
        patch.setattr(Lines, 'on_train_batch_end', lambda self, *_: signal.raise_signal(signal.SIGTERM))
        assert cli.main([*arguments, '--resume', str(folder / 'checkpoint-4.ckpt')]) == 75
    assert sorted(path.name for path in folder.glob('*.ckpt')) == [
        'best.ckpt', 'checkpoint-4.ckpt', 'checkpoint-5.ckpt']
    assert iteration(folder / 'best.ckpt') == 4  # the only evaluation that there has been
    assert not (folder / 'metrics.json').exists()
    assert cli.main([*arguments, '--resume', 'auto']) == 0
    assert 'checkpoint-5.ckpt, after 5 iterations' in caplog.text
    assert any(not torch.equal(a, b) for a, b in zip(weights(folder).values(), weights(run).values()))
    rows = {int(row['epoch']): float(row['eval_map'])
            for row in csv.DictReader((folder / 'summary.csv').read_text().splitlines())}
    assert iteration(folder / 'best.ckpt') == max(rows, key=rows.get) and list(rows) == [4, 6]


def test_going_on_from_the_best(tmp_path):
    """What lies in the folder says what is the best so far, also if the run was killed before it was written."""
    from timm_rla.detection.checkpoint import go_back

    def write(name, step):
        torch.save(dict(global_step=step, state_dict={}), tmp_path / f'{name}.ckpt')

    for step in 2, 4, 6:
        write(f'checkpoint-{step}', step)
    for best, step, left, score in [(2, 6, 6, .5), (6, 6, 6, .5), (2, 4, 2, .3), (6, 4, 4, .2), (None, 4, 4, .2),
                                    (None, 3, None, None)]:
        (tmp_path / 'summary.csv').write_text('epoch,eval_map\n2,0.3\n4,0.2\n6,0.5\n')
        (tmp_path / 'best.ckpt').unlink(missing_ok=True)
        if best:
            write('best', best)
        write(f'checkpoint-{step}', step)
        assert go_back(tmp_path, tmp_path / f'checkpoint-{step}.ckpt', step) == score
        assert (iteration(tmp_path / 'best.ckpt') if left else None) == left
    write('best', 8)
    assert go_back(tmp_path, tmp_path / 'best.ckpt', 8) is None and iteration(tmp_path / 'checkpoint-8.ckpt') == 8


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
    assert 'table own, not bccd' in capsys.readouterr().err
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
