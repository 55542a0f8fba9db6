"""Going on with a run of a detector: after it was killed, was asked to stop, or is to be longer or another."""
import argparse
import csv
import shutil
import signal

import pytest
import timm
import torch
from small_detectors import TRAIN, iteration, weights

import timm_rla_cli as cli

pytest.importorskip('lightning')
pytest.importorskip('faster_coco_eval')


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
