"""The command: runs of a table are made, skipped, gone on with, stopped and reported."""
import os
import shlex
import shutil
import subprocess
import sys
import time
from importlib import resources

import pytest
import yaml
from helpers import run_without_reader, small_table, write_run

import timm_rla_cli as cli
from timm_rla.common.lock import exclusive
from timm_rla.common.options import parse
from timm_rla.reproduce.plan import Run
from timm_rla.reproduce.results import Results
from timm_rla.reproduce.runs import _outcome
from timm_rla.reproduce.tasks import TASKS

COMMON = ['--depth', '20', '--datasets', 'cifar10', '--only', 'rla', '--dataset', '', '--device', 'cpu', '--img-size',
          '8', '--batch-size', '16', '--in-memory', '--workers', '0', '--log-interval', '1000']


@pytest.mark.long
def test_command_end_to_end(image_folder, tmp_path, capsys, monkeypatch):
    """Runs are made, skipped when they are there, gone on with when they are not whole, and reported."""
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    command = ['reproduce', 'table1', *COMMON, '--data-dir', str(image_folder), '--output', str(tmp_path / 'out'),
               '--epochs', '2', '--seeds', '0', '--data-note', 'digits']
    assert cli.main([*command, '--report']) == 2 and 'nothing has been run' in capsys.readouterr().err
    assert cli.main([*command, '--print']) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    assert len(printed) == 2 and all('--resume auto' in line for line in printed)
    assert shlex.split(printed[0])[1:4] == ['-m', 'timm_rla', 'train']
    assert cli.main(shlex.split(printed[0])[3:]) == 0  # as another machine may run it
    assert (tmp_path / 'out' / 'cifar10-20-plain-seed0' / 'last.pth.tar').is_file()
    assert cli.main([*command, '--print']) == 0
    assert capsys.readouterr().out.strip().splitlines() == printed[1:]
    assert cli.main([*command, '--report']) == 0
    assert '| ResNet-20 |' in (tmp_path / 'out' / 'report.md').read_text()
    capsys.readouterr()

    assert cli.main([*command, '--jobs', '2']) == 0
    out = capsys.readouterr().out
    assert '1 of 2 runs are finished, 1 to go' in out and '[1/1]' in out and 'Top-1 error' in out
    for name in ('report.md', 'report.csv', 'curves.png', 'differences.png'):
        assert (tmp_path / 'out' / name).stat().st_size > 0
    assert '2 epochs instead of 160' in (tmp_path / 'out' / 'report.md').read_text()
    assert 'digits' in (tmp_path / 'out' / 'report.md').read_text()

    folder = tmp_path / 'out' / 'cifar10-20-plain-seed0'
    before = (folder / 'last.pth.tar').stat().st_mtime_ns
    assert cli.main(command) == 0
    assert '2 of 2 runs are finished, 0 to go' in capsys.readouterr().out
    assert (folder / 'last.pth.tar').stat().st_mtime_ns == before
    (folder / 'summary.csv').write_bytes(b'')  # as a full disk or a crash may leave it
    assert cli.main([*command, '--print']) == 0
    again, = capsys.readouterr().out.strip().splitlines()
    assert again == printed[0] and cli.main(shlex.split(again)[3:]) == 0
    capsys.readouterr()
    assert cli.main([*command, '--print']) == 0 and not capsys.readouterr().out

    checkpoint = tmp_path / 'out' / 'cifar10-20-rla-seed0' / 'last.pth.tar'
    freeze = ['freeze', str(checkpoint), '--data-dir', str(image_folder), '--device', 'cpu', '--workers', '0']
    assert cli.main([*freeze, '--study']) == 0
    assert cli.main([*command, '--report']) == 0
    text = (tmp_path / 'out' / 'report.md').read_text()
    assert '## With attention, and with its means' in text and '| RLA-20 | `layer3.2` |' in text
    assert (tmp_path / 'out' / 'attentions.png').stat().st_size > 0
    report = tmp_path / 'out' / 'report.md'
    (tmp_path / 'out' / 'report.csv').unlink(), (tmp_path / 'out' / 'report.csv').mkdir()
    report.write_text('as before')
    assert cli.main([*command, '--report']) == 2  # all of it or nothing
    assert 'report.csv: is a folder' in capsys.readouterr().err and report.read_text() == 'as before'


@pytest.mark.parametrize('options, words', [
    (['--only', 'rlo'], ['rlo', 'rla_vector']),
    (['--datasets', 'mnist'], ['mnist', 'cifar10']),
    (['--epochs', '0'], ['--epochs 0']),
    (['--jobs', '0'], ['--jobs 0']),
    (['--iterations', '9'], ['--iterations', 'table1', '--epochs']),
    (['--lernrate', '1'], ['--lernrate']),
    (['--depth', '20', '21'], ['--depth 21', '20, 32, 44, 56, 110']),
    (['--depth', '0'], ['--depth 0', '110']),
    (['--model', 'resnet18'], ['--model resnet18', '--only']),
    (['--seed=5'], ['--seed 5', '--seeds']),
    (['--seeds', '0', '-1'], ['--seeds -1', 'from 0']),
    (['--experiment', 'x'], ['--experiment x']),
    (['--resume', 'foo'], ['--resume foo']),
    (['--start-epoch', '1'], ['--start-epoch 1']),
    (['--no-resume-opt'], ['--no-resume-opt']),
    (['--val-split', ''], ["--val-split ''", 'no top-1 error to report']),
    (['--data-note', 'a\nb'], ['--data-note', 'line breaks']),
    (['-c', 'cifar100'], ['--config cifar100']),
    (['--only', 'gmp', '--model-kwargs', 'context=gap'], ['--model-kwargs context=gap', 'context=gmp']),
    (['--sched', 'foo'], ['--sched foo', 'multistep']),
    (['--report', '--print'], ['--print --report']),
    (['--report', '--jobs', '2'], ['--report --jobs']),
    (['--print', '--devices', 'cpu'], ['--print --devices']),
    (['--report', '--output', 'nowhere'], ['--output nowhere', 'nothing has been run']),
    (['--report', '--output', __file__], ['test_reproduce.py: is a file']),
    (['--report', '--output', 'x' * 300], ['--output', 'name too long']),
], ids=str)
def test_bad_input(tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    assert cli.main(['reproduce', 'table1', *options]) == 2
    line = capsys.readouterr().err.strip()
    assert all(word in line for word in words), line
    assert not list(tmp_path.iterdir())


def test_folder_of_another_table(tmp_path, capsys):
    """It is refused, unless it holds no run yet."""
    folder = tmp_path / 'out'
    folder.mkdir()
    settings = folder / 'table.yaml'
    settings.write_text(yaml.safe_dump(dict(table='table3', epochs=None, options=[])))
    (folder / 'cifar10-56-plain-seed0').mkdir()
    for further in ([], ['--print'], ['--report']):
        assert cli.main(['reproduce', 'table1', '--output', str(folder), *further]) == 2
        assert 'table table3, not table1' in capsys.readouterr().err
    (folder / 'cifar10-56-plain-seed0').rmdir()
    assert cli.main(['reproduce', 'table1', '--output', str(folder), '--print']) == 0
    assert yaml.safe_load(settings.read_text())['table'] == 'table1'
    for damaged, words in (('my: {file: 1}\n', 'its table.yaml is none of results'), ('[', 'out: table.yaml: ')):
        settings.write_text(damaged)
        assert cli.main(['reproduce', 'table1', '--output', str(folder), '--print']) == 2
        assert words in capsys.readouterr().err and settings.read_text() == damaged
    settings.unlink()
    (folder / 'mine.txt').write_text('mine')
    assert cli.main(['reproduce', 'table1', '--output', str(folder)]) == 2
    assert 'neither empty nor' in capsys.readouterr().err and (folder / 'mine.txt').read_text() == 'mine'


def test_a_run_with_other_options(tmp_path, capsys):
    """Its command was printed for the folder before another one, and has run since."""
    command = ['reproduce', 'table1', '--depth', '20', '--datasets', 'cifar10', '--only', 'plain', '--seeds', '0',
               '--output', str(tmp_path / 'out')]
    assert cli.main([*command, '--lr', '0.5', '--print']) == 0
    line = shlex.split(capsys.readouterr().out)[4:]
    assert cli.main([*command, '--lr', '0.25', '--print']) == 0
    run = tmp_path / 'out' / 'cifar10-20-plain-seed0'
    run.mkdir()
    args = vars(parse(TASKS['classification'].parser(), line))
    (run / 'args.yaml').write_text(yaml.safe_dump(dict(args, device='cuda', workers=77)))
    for further in ([], ['--print'], ['--report']):
        assert cli.main([*command, '--lr', '0.25', *further]) == 2
        assert 'cifar10-20-plain-seed0 is a run with lr 0.5, not 0.25' in capsys.readouterr().err
    (tmp_path / 'out' / 'table.yaml').write_text(yaml.safe_dump(dict(table='table1', epochs=None,
                                                                     options=['--lr', '0.5'])))
    assert cli.main([*command, '--lr', '0.5', '--report']) == 0


def test_two_harnesses_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('timm_rla.commands.reproduce.check_inputs', lambda *args: None)
    results = Results(tmp_path / 'out', small_table(), None, [])
    with results.locked():
        assert cli.main(['reproduce', 'table1', '--depth', '20', '--datasets', 'cifar10', '--output',
                         str(tmp_path / 'out')]) == 2
    assert 'another process runs this table' in capsys.readouterr().err


@pytest.mark.parametrize('module', ['matplotlib', 'scipy'])
def test_what_the_report_needs_is_asked_for_before_the_runs(tmp_path, capsys, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)  # as where it is not installed
    command = ['reproduce', 'table1', '--depth', '20', '--datasets', 'cifar10', '--output', str(tmp_path / 'out')]
    assert cli.main(command) == 2
    assert f"{module} is not installed: pip install 'timm_rla[analysis]'" in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()
    assert cli.main([*command, '--print']) == 0


@pytest.mark.long
def test_a_failed_run_is_named(image_folder, tmp_path, capsys, monkeypatch):
    """Two that fail in a row are enough: what is wrong with them is wrong with the others, or the device is."""
    monkeypatch.chdir(tmp_path)
    options = ['--data-dir', str(image_folder), '--output', 'out', '--seeds', '0', '1', '--opt', 'nosuch']
    assert cli.main(['reproduce', 'table1', *COMMON, *options, '--jobs', '99999999']) == 2
    captured = capsys.readouterr()
    assert captured.out.count('failed: timm-rla train: error: --opt nosuch') == 4 and '4 runs failed' in captured.err
    assert 'missing' in (tmp_path / 'out' / 'report.md').read_text()
    assert cli.main(['reproduce', 'table1', *COMMON, *options, '--jobs', '1']) == 2
    captured = capsys.readouterr()
    assert '2 runs have failed in a row' in captured.out and '2 runs were not started' in captured.out
    assert '2 runs failed' in captured.err


@pytest.mark.parametrize('options, words', [
    ([], ['--data-dir: not given', 'torch/cifar10']),
    (['--dataset', '', '--data-dir', 'nowhere'], ['--data-dir nowhere: no such folder']),
    (['--dataset', '', '--data-dir', 'FOLDER', '--device', 'cuda:9'], ['--device cuda:9']),
    (['--dataset', '', '--data-dir', 'FOLDER', '--devices', 'cpu', 'bad'], ['--device bad: no such device']),
    (['--dataset', '', '--data-dir', 'FOLDER', '--devices', ''], ["--device ''"]),
    (['--dataset', '', '--data-dir', 'FOLDER', '--datasets', 'cifar100'], ['10 classes, cifar100 of this table 100']),
    (['--dataset', '', '--data-dir', 'FOLDER', '--num-classes', '12'], ['has 10 classes', '12']),
    (['--print', '--data-dir', 'a\nb'], ["'a\\nb'", 'one line']),
], ids=str)
def test_what_is_wrong_with_all_runs_is_said_once(image_folder, tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    options = [str(image_folder) if option == 'FOLDER' else option for option in options]
    assert cli.main([*SMALL, *options]) == 2
    captured = capsys.readouterr()
    line, = captured.err.strip().splitlines()
    assert all(word in line for word in words), line
    assert not captured.out


def test_other_signals_and_runs_under_way(tmp_path, capsys, monkeypatch, hangup):
    """A run that another process is at is left to it; a run that ends by the signal of all has not failed."""
    monkeypatch.setattr('timm_rla.commands.reproduce.check_inputs', lambda *args: None)
    out = tmp_path / 'out'
    with exclusive(out / 'cifar10-20-plain-seed0', str):
        (out / 'table.yaml').write_text(yaml.safe_dump(dict(table='table1', epochs=None, options=[])))
        (out / 'table.yaml.timm-rla.tmp').touch()  # of a process that was killed
        monkeypatch.setattr(Results, 'command', lambda self, run, device: [
            sys.executable, '-c', f'import os, signal; os.kill({os.getpid()}, {int(hangup)}); exit(-15)'])
        assert cli.main([*SMALL, '--output', str(out)]) == 75
    captured = capsys.readouterr()
    assert 'cifar10-20-plain-seed0  is under way: process' in captured.out and 'failed' not in captured.out
    assert 'the same command goes on' in captured.err and not (out / 'report.md').exists()


@pytest.mark.long
def test_asked_to_stop(image_folder, tmp_path):
    """The signal reaches the runs, which keep where they are; nothing is left behind, and the command goes on."""
    command = [sys.executable, '-m', 'timm_rla', 'reproduce', 'table1', *COMMON, '--data-dir', str(image_folder),
               '--output', str(tmp_path / 'out'), '--epochs', '300', '--seeds', '0']
    process = subprocess.Popen(command, env=dict(os.environ, OMP_NUM_THREADS='1'), stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.DEVNULL, start_new_session=True)
    run = tmp_path / 'out' / 'cifar10-20-plain-seed0'
    deadline = time.monotonic() + 100
    while not (run / 'last.pth.tar').exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75 and 'the same command goes on' in errors and 'Traceback' not in errors
    assert len(list(run.glob('recovery-*.pth.tar'))) == 1
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


SMALL = ['reproduce', 'table1', '--depth', '20', '--datasets', 'cifar10', '--only', 'rla', '--seeds', '0']


def test_a_folder_among_the_options(tmp_path, capsys):
    options = ['--epochs', '30', '--output', str(tmp_path / 'out'), '--print']
    assert cli.main([*SMALL[:2], 'photos', *SMALL[2:], *options]) == 0
    for line in capsys.readouterr().out.splitlines():
        args = parse(TASKS['classification'].parser(), shlex.split(line)[4:])
        assert args.data == 'photos' and args.decay_milestones == [16, 23]


def test_recipes_are_those_of_the_package(tmp_path, capsys, monkeypatch):
    """Whatever lies in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'cifar10').write_text('lr: 0.5')
    assert cli.main([*SMALL, '--print']) == 0
    line = shlex.split(capsys.readouterr().out.splitlines()[0])[4:]
    assert parse(TASKS['classification'].parser(), line).lr == 0.1


def test_a_table_in_the_folder_that_it_is_for(tmp_path, capsys):
    own = tmp_path / 'table.yaml'
    shutil.copy(resources.files('timm_rla.reproduce.tables').joinpath('table1.yaml'), own)
    before = own.read_text()
    assert cli.main(['reproduce', str(own), *COMMON, '--output', str(tmp_path), '--print']) == 2
    assert 'its table.yaml is none of results' in capsys.readouterr().err and own.read_text() == before


def test_a_table_of_the_same_name(tmp_path, capsys):
    own = tmp_path / 'table1.yaml'
    shutil.copy(resources.files('timm_rla.reproduce.tables').joinpath('table1.yaml'), own)
    out = ['--output', str(tmp_path / 'out'), '--print']
    assert cli.main([*SMALL, *out]) == 0
    (tmp_path / 'out' / 'cifar10-20-plain-seed0').mkdir()
    assert cli.main(['reproduce', str(own), *SMALL[2:], *out]) == 2
    assert 'table table1, not table1.yaml' in capsys.readouterr().err


@pytest.mark.parametrize('options, code', [
    (['--dataset=', '--data-dir', 'a', '-j', '1'], 0), (['--data-dir', 'a', '--device', 'cpu', '--dataset='], 0),
    (['--dataset', '', '--data-dir', 'b'], 2), (['--dataset', '', '--data-dir', 'a', '--lr', '0.2'], 2),
    (['--dataset', '', '--data-dir', 'a{seed}'], 2), (['--dataset', '', '--data-dir', 'a', '--epochs', '160'], 0),
    (['--dataset', '', '--data-dir', 'a', '--epochs', '150'], 2),
], ids=str)
def test_the_same_options_otherwise_written(tmp_path, capsys, options, code):
    """Those that say where and how runs go may be others."""
    out = ['--output', str(tmp_path / 'out')]
    assert cli.main([*SMALL, '--dataset', '', '--data-dir', 'a', '-j', '4', *out, '--print']) == 0
    (tmp_path / 'out' / 'cifar10-20-plain-seed0').mkdir()
    assert cli.main([*SMALL, *options, *out, '--report']) == code
    assert code == 0 or 'choose another folder' in capsys.readouterr().err


@pytest.mark.parametrize('options, jobs', [
    ([], 1), (['--devices', 'cpu', 'cuda:1'], 2), (['--devices', 'cpu', 'cuda:1', '--jobs', '3'], 3)])
def test_a_run_at_a_time_for_each_device(tmp_path, monkeypatch, options, jobs):
    found = []
    monkeypatch.setattr('timm_rla.commands.reproduce.check_inputs', lambda *args: None)
    monkeypatch.setattr('timm_rla.commands.reproduce.run_all', lambda results, runs, *args: found.append(args) or [])
    assert cli.main([*SMALL, '--output', str(tmp_path / 'out'), *options]) == 0
    assert found == [(jobs, ['cpu', 'cuda:1'] if options else [])]


def test_a_folder_in_the_place_of_a_log(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('timm_rla.commands.reproduce.check_inputs', lambda *args: None)
    (tmp_path / 'out' / 'cifar10-20-rla-seed0.log').mkdir(parents=True)
    (tmp_path / 'out' / 'table.yaml').write_text(yaml.safe_dump(dict(table='table1', epochs=None, options=[])))
    assert cli.main([*SMALL, '--output', str(tmp_path / 'out')]) == 2
    assert 'cifar10-20-rla-seed0.log' in capsys.readouterr().err


def test_the_reason_of_a_failure_is_the_error(tmp_path):
    """Not what another process writes to the same log, nor what an earlier start has written."""
    results, run = Results(tmp_path, small_table(), 2, []), Run(small_table().cells[0], 0)
    log = tmp_path / f'{run.name}.log'
    log.write_text('timm-rla train: error: earlier\n')
    begin = log.stat().st_size
    with open(log, 'a') as f:
        f.write('timm-rla train: error: locked\nEpoch 2/9  train loss 1\n')
    assert _outcome(results, run, 2, begin) == 'failed: timm-rla train: error: locked'
    assert _outcome(results, run, -9, begin) == 'failed: killed by signal 9 (Killed)'


def test_who_reads_what_is_printed_may_go():
    code = 'from timm_rla.reproduce.runs import _say; _say("a"); _say("b"); sys.exit(3)'
    assert run_without_reader(code) == (3, b'')


def test_printed_lines_run_with_xargs(tmp_path, capsys):
    """Also where a value has spaces and quotes."""
    data = tmp_path / "it's here"
    assert cli.main([*SMALL, '--dataset', '', '--data-dir', str(data), '--output', str(tmp_path / 'out'),
                     '--print']) == 0
    lines = capsys.readouterr().out.replace(shlex.quote(sys.executable), 'echo')
    done = subprocess.run(['xargs', '-d', '\n', '-n', '1', 'sh', '-c'], input=lines, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f'--data-dir {data} ') == len(lines.splitlines()) > 1


def test_pictures_of_runs_that_are_gone_go(tmp_path):
    results = Results(tmp_path / 'out', small_table(only=['rla']), 2, [])
    results.record()
    for cell in results.table.cells:
        write_run(results, Run(cell, 0), 90.)
    command = [*SMALL, '--epochs', '2', '--output', str(tmp_path / 'out'), '--report']
    assert cli.main(command) == 0 and (tmp_path / 'out' / 'curves.png').is_file()
    for summary in (tmp_path / 'out').glob('*/summary.csv'):
        summary.unlink()
    assert cli.main(command) == 0
    assert {path.name for path in (tmp_path / 'out').iterdir() if path.is_file() and path.name[0] != '.'} == {
        'report.csv', 'report.md', 'table.yaml'}
