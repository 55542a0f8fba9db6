"""The report of a table: figures, intervals, pictures, studies of attention, and what is damaged."""
import csv
import json
import math
import statistics
from dataclasses import replace

import pytest
from helpers import SUMMARY_HEADER, small_table, write_run

import timm_rla_cli as cli
from timm_rla.common.errors import UserError
from timm_rla.common.plotting import save_picture
from timm_rla.reproduce.plan import Run, load_table
from timm_rla.reproduce.plots import plot_attentions, plot_curves, plot_differences
from timm_rla.reproduce.report import facts, paired_interval, report_rows, title, write_figures, write_markdown
from timm_rla.reproduce.results import Results
from timm_rla.reproduce.studies import Studied, markdown_lines, read_studies


def test_interval_against_the_formula():
    differences = [-0.4, 0.1, -0.3, -0.2]
    lower, upper = paired_interval(differences)
    half = 3.182446 * statistics.stdev(differences) / math.sqrt(4)  # t of 3 degrees of freedom, from a table
    assert (lower + upper) / 2 == pytest.approx(-0.2) and (upper - lower) / 2 == pytest.approx(half, rel=1e-5)
    assert paired_interval([1.]) is None


def test_report(tmp_path):
    table = small_table(only=['rla', 'se'])
    results = Results(tmp_path / 'out', table, 2, [])
    plain, rla, _ = sorted(table.cells, key=lambda cell: ['plain', 'rla', 'se'].index(cell.key))
    for seed, (first, second) in enumerate(zip((90., 91., 92.), (91., 91.5, 93.))):
        write_run(results, Run(plain, seed), first)
        write_run(results, Run(rla, seed), second)
    write_run(results, Run(rla, 3), 50., epochs=1)  # not finished
    rows = {row.cell.key: row for row in report_rows(results, [0, 1, 2, 3])}
    assert rows['rla'].mean == pytest.approx(100 - statistics.mean((91., 91.5, 93.)))
    assert rows['rla'].std == pytest.approx(statistics.stdev((91., 91.5, 93.)))
    assert rows['rla'].difference == pytest.approx(-(1 + 0.5 + 1) / 3) and rows['rla'].pairs == 3
    assert rows['se'].mean is None and rows['plain'].difference is None

    text = write_markdown(tmp_path / 'report.md', 'A title', list(rows.values()), 'epoch').read_text()
    assert '| RLA-20 |' in text and '8.17 ± 1.04' in text and 'missing' in text and '3 of 4' in text
    with open(write_figures(tmp_path / 'report.csv', list(rows.values()))) as f:
        lines = list(csv.DictReader(f))
    assert [float(line['value']) for line in lines if line['cell'] == 'rla'] == [9., 8.5, 7.]


@pytest.mark.parametrize('rows, values, said', [
    (['0,1.0,1.0,80.0,99.0,0.1', '1,nan,1.0,90.0,99.0,0.1'], {0: 10.}, ''),  # its loss was nan: that is its result
    (['0,1.0,1.0,-500.0,99.0,0.1', '1,1.0,1.0,90.0,99.0,0.1'], {0: 10.}, 'not in the curves'),
    (['0,1.0,,,,0.1', '1,1.0,1.0,90.0,99.0,0.1'], {0: 10.}, 'not in the curves'),
    (['0,1.0,1.0,80.0,99.0,0.1', '1,1.0,1.0,nan,99.0,0.1'], {}, 'the run is left out'),
    (['0,1.0,1.0,80.0,99.0,0.1', '1,1.0,1.0,-500.0,99.0,0.1'], {}, 'the run is left out'),
    (['0,1.0,1.0,80.0,99.0,0.1', '1,1.0,1.0,,99.0,0.1'], {}, 'the run is left out'),
    (['0,1.0,1.0,80.0,99.0,0.1', '1,,1.0,90.0,99.0,0.1'], {}, 'the run is left out'),
])
def test_damaged_rows_are_named_and_left_out(tmp_path, caplog, rows, values, said):
    results = Results(tmp_path / 'out', small_table(only=['plain']), 2, [])
    plain, = results.table.cells
    write_run(results, Run(plain, 1), 91.)
    write_run(results, Run(plain, 0), 91.)
    file = results.path / Run(plain, 0).name / 'summary.csv'
    file.write_text(SUMMARY_HEADER + '\n'.join(rows) + '\n')
    found = report_rows(results, [0, 1])
    assert found[0].values == pytest.approx({1: 9., **values})
    assert (said in caplog.text and str(file) in caplog.text) if said else not caplog.text
    assert plot_curves(results, found, '', tmp_path / 'a.png').stat().st_size > 0


def test_report_of_detectors(tmp_path):
    """Two metrics, each with its own table; larger is better, and a run is finished with its last iteration."""
    results = Results(tmp_path / 'out', load_table('bccd', only=['rla']), 40, [])
    plain, rla = results.table.cells
    for cell, seed, last, value in [(plain, 0, 40, .5), (plain, 1, 40, .6), (rla, 0, 40, .53), (rla, 1, 40, .61),
                                    (rla, 2, 39, .9)]:
        folder = results.path / Run(cell, seed).name
        folder.mkdir(parents=True)
        (folder / 'summary.csv').write_text(
            f'epoch,train_loss,eval_map,eval_map_50,lr\n20,1.0,.99,.99,.1\n{last},1.0,{value},{value + .2},.1\n')
    rows = report_rows(results, [0, 1, 2])
    assert [(row.metric.key, row.cell.key) for row in rows] == [
        ('map', 'plain'), ('map', 'rla'), ('map_50', 'plain'), ('map_50', 'rla')]
    assert rows[1].values == pytest.approx({0: 53., 1: 61.}) and rows[3].values == pytest.approx({0: 73., 1: 81.})
    assert rows[1].difference == pytest.approx(2.) and rows[1].pairs == 2
    assert rows[0].params < rows[1].params < 1.1 * rows[0].params
    text = write_markdown(tmp_path / 'report.md', title(results), rows, 'iteration').read_text()
    assert '40 iterations instead of 800' in text and 'above 0 is better' in text
    assert text.index('mAP@[.5,.95] in percent after the last iteration') < text.index('mAP@.5 in percent')
    assert plot_curves(results, rows, '', tmp_path / 'a.png').stat().st_size > 0
    assert plot_differences(rows, 'mAP', '', tmp_path / 'b.png').stat().st_size > 0


@pytest.mark.parametrize('papers, legend', [
    ((8., None, 7.), ['here, with 95 % interval', 'here, one seed: no interval', 'paper']),
    ((None, 8., 7.), ['here, with 95 % interval', 'here, one seed: no interval']),  # no plain figure to compare with
])
def test_legend_of_differences(tmp_path, figures, papers, legend):
    """In the first case the paper has no figure for the first network. The second network has one seed."""
    table = small_table(only=['rla', 'se'])
    results = Results(tmp_path / 'out', table, 2, [])
    for cell in table.cells:
        for seed in (0, 1)[:1 if cell.key == 'se' else 2]:
            write_run(results, Run(cell, seed), 90. + seed)
    rows = [replace(row, cell=replace(row.cell, paper={} if figure is None else {'error': figure}))
            for row, figure in zip(report_rows(results, [0, 1]), papers)]
    plot_differences(rows, 'error', '', tmp_path / 'a.png')
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == legend


def test_no_run_is_left_out(tmp_path, capsys, caplog):
    """Whatever seeds and networks are asked for, the report has all that are there; what it cannot have is named."""
    options = ['--datasets', 'cifar10', '--epochs', '2', '--output', str(tmp_path / 'out')]
    table = load_table('table1', depths=[20, 32], datasets=['cifar10'], only=['rla', 'se'])
    results = Results(tmp_path / 'out', table, 2, [])
    results.record()
    for cell in table.cells:
        for seed in (0, 4):
            write_run(results, Run(cell, seed), 90. + seed)
    report = ['reproduce', 'table1', '--depth', '20', *options, '--report']
    assert cli.main([*report, '--seeds', '3', '--only', 'rla', '--data-note', 'a note']) == 0
    text = (tmp_path / 'out' / 'report.md').read_text()
    assert '| SE-20 |' in text and '2 of 3' in text and 'GMP' not in text and '| RLA-32 |' not in text
    for words in (caplog.text, text):
        assert 'not in this report: cifar10-32-plain-seed0, cifar10-32-plain-seed4, cifar10-32-rla-seed0' in words
    assert text.startswith('# Table 1, variants of depth 20 on CIFAR, 2 epochs instead of 160, a note\n')
    assert cli.main(['reproduce', 'table1', '--depth', '20', '32', *options, '--report']) == 0
    text = (tmp_path / 'out' / 'report.md').read_text()  # the note is kept
    assert text.startswith('# Table 1, variants of depth 20, 32 on CIFAR, 2 epochs instead of 160, a note\n\nTop-1')
    assert '| RLA-32 |' in text and 'GMP' in text and 'not in this report' not in text


def test_title_and_facts_say_what_is_not_as_in_the_recipe(tmp_path):
    results = Results(tmp_path, small_table(only=['rla']), 160, ['--lr', '0.01', '--initial-checkpoint', 'a b'])
    assert title(results) == 'Table 1, variants of depth 20 on CIFAR'  # 160 epochs are the recipe's
    assert facts(results) == ["Options of every run, beside those of the recipe and the table: "
                              "`--lr 0.01 --initial-checkpoint 'a b'`."]
    assert facts(Results(tmp_path, small_table(only=['rla']), 160, [])) == []


@pytest.fixture
def figures(monkeypatch):
    """Figures that are drawn, which are not written."""
    drawn = []
    monkeypatch.setattr('timm_rla.reproduce.plots.save_picture', lambda figure, output: drawn.append(figure))
    return drawn


def test_curves_of_one_epoch_of_many_networks(tmp_path, figures):
    """Points can be seen, lines told apart, and no network is missing from the legend."""
    table = small_table()
    table = replace(table, cells=[replace(cell, name=f'_{cell.name}') for cell in table.cells])
    results = Results(tmp_path / 'out', table, 1, [])
    for cell in table.cells:
        write_run(results, Run(cell, 0), 90., epochs=1)
    plot_curves(results, report_rows(results, [0]), '', tmp_path / 'a.png')
    lines = figures[0].axes[1].get_lines()
    assert len(lines) == len(table.cells) == 8 and all(line.get_marker() == 'o' for line in lines)
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 8
    assert [text.get_text() for text in figures[0].axes[1].get_xticklabels()] == ['1']
    legend = [text.get_text().strip() for text in figures[0].axes[1].get_legend().get_texts()]
    assert legend == [f'{cell.name}, n = 1' for cell in table.cells]


def test_values_that_no_axis_holds(tmp_path):
    results = Results(tmp_path / 'out', small_table(only=['plain']), 2, [])
    run = Run(results.table.cells[0], 0)
    write_run(results, run, 91.)
    file = results.path / run.name / 'summary.csv'
    file.write_text(file.read_text().replace(',1.0,1.0,', ',1e308,1.0,'))
    assert plot_curves(results, report_rows(results, [0]), '', tmp_path / 'a.png').stat().st_size > 0
    file.write_text(file.read_text().replace('\n1,', f'\n{"9" * 26},'))
    assert not report_rows(results, [0])[0].values  # its last epoch is none


def test_attentions_of_networks_with_other_blocks(figures, tmp_path):
    table = load_table('table2', [20, 32], ['cifar10'], ['rla'])
    shallow, deep = (cell for cell in table.cells if cell.key == 'rla')

    def study(blocks):
        change_of = dict(difference=.1, interval=[0., .2])
        return dict(means=change_of, class_means=change_of, split='few', held=dict.fromkeys(blocks, change_of),
                    blocks=dict.fromkeys(blocks, dict(mean=.5, std=.1, class_std=.1)))

    studied = [Studied(shallow, [0], [study(['a', 'b'])]), Studied(deep, [0], [study(['a', 'b', 'c'])])]
    plot_attentions(studied, '', tmp_path / 'a.png')
    names = [[text.get_text() for text in ax.get_xticklabels()] for ax in figures[0].axes]
    assert names == [['a', 'b']] * 2 + [['a', 'b', 'c']] * 2
    assert [len(ax.get_lines()[0].get_xdata()) for ax in figures[0].axes] == [2, 2, 3, 3]
    assert 'images of the split few' in '\n'.join(markdown_lines(studied))


def test_titles_are_no_formulas(tmp_path, figures):
    """They are broken into lines, each of them within the picture."""
    note = r'$\foo{$ and $x_1$ ' + 20 * 'words '
    results = Results(tmp_path, small_table(only=['rla']), 2, [], note)
    for cell in results.table.cells:
        write_run(results, Run(cell, 0), 90.)
    rows, heading = report_rows(results, [0]), title(results)
    plot_curves(results, rows, heading, tmp_path / 'c.png')
    plot_differences(rows, 'error', heading, tmp_path / 'd.png')
    assert len(figures) == 2
    for figure in figures:
        assert save_picture(figure, tmp_path / 'picture.png').is_file()
        shown = figure._suptitle
        assert ' '.join(shown.get_text().split()).endswith(' '.join(note.split()))
        figure.draw_without_rendering()  # it was drawn at the dots per inch of the file
        box = shown.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width and shown.get_text().count('\n') in (1, 2)


def test_studies(tmp_path):
    """Figures of two seeds, by hand; error is what accuracy loses."""
    table = small_table(only=['rla'])
    results = Results(tmp_path, table, 2, [])
    rla = next(cell for cell in table.cells if cell.key == 'rla')
    for seed, (loss, mean) in enumerate([(-0.5, 0.2), (-0.3, 0.4)]):
        write_run(results, Run(rla, seed), 90.)
        (results.path / Run(rla, seed).name / 'frozen.json').write_text(json.dumps(dict(
            means=dict(difference=loss, interval=[loss - 0.3, loss + 0.2]),
            class_means=dict(difference=0.1, interval=[0, 0.2]),
            blocks={'layer1.0': dict(mean=mean, std=0.01, class_std=0.005)},
            held={'layer1.0': dict(difference=loss / 2)})))
    studied = read_studies(results, report_rows(results, [0, 1]))
    assert [entry.cell for entry in studied] == [rla]
    text = '\n'.join(markdown_lines(studied))
    half = 12.7062 * 0.1  # t of 1 degree of freedom, standard error of -0.5 and -0.3
    assert f'| RLA-20 | mean | +0.40 | {0.4 - half:+.2f} to {0.4 + half:+.2f} | -0.10 | -0.10 to -0.10 |' in text
    assert '| RLA-20 | 0 | +0.50 | +0.30 to +0.80 | -0.10 | -0.20 to +0.00 |' in text
    block = ['`layer1.0`', '0.3000 (0.2000 to 0.4000)', '0.0100 (0.0100 to 0.0100)', '0.0050 (0.0050 to 0.0050)',
             '+0.20 (+0.15 to +0.25)']
    assert f'| RLA-20 | {" | ".join(block)} |' in text
    assert markdown_lines([]) == []


@pytest.mark.parametrize('change, message', [
    (lambda study: [study], 'indices'),
    (lambda study: dict(study, blocks=[]), 'items'),
    (lambda study: dict(study, blocks={}), 'no blocks'),
    (lambda study: dict(study, blocks={'layer1.0': dict(mean=.5)}), 'std'),
    (lambda study: dict(study, blocks={'layer1.0': 3}), 'frozen.json'),
    (lambda study: dict(study, held={}), 'layer1.0'),
    (lambda study: dict(study, means=dict(difference='x', interval=[0., .2])), "difference of means is 'x'"),
    (lambda study: dict(study, means=dict(difference=10 ** 400, interval=[0., .2])), 'frozen.json'),
    (lambda study: dict(study, means=dict(difference=.1, interval=[0., None])), 'upper end of means is None'),
    (lambda study: dict(study, means=dict(difference=.1)), 'interval'),
    (lambda study: dict(study, epoch='last'), "epoch is 'last'"),
])
def test_a_damaged_study_is_named(tmp_path, change, message):
    results = Results(tmp_path, small_table(only=['rla']), 2, [])
    run = Run(results.table.cells[1], 0)
    write_run(results, run, 90.)
    file = results.path / run.name / 'frozen.json'
    change_of = dict(difference=.1, interval=[0., .2])
    study = dict(means=change_of, class_means=change_of,
                 blocks={'layer1.0': dict(mean=.5, std=.1, class_std=.1)}, held={'layer1.0': dict(difference=.1)})
    rows = report_rows(results, [0])
    for whole in study, dict(study, epoch=1):
        file.write_text(json.dumps(whole))
        assert read_studies(results, rows)[0].studies == [whole]
    for other in dict(epoch=0), dict(use_ema=True), dict(model='rla_vector_resnet20_cifar'):  # 0: the run has gone on
        file.write_text(json.dumps(dict(study, **other)))
        assert read_studies(results, rows) == []
    file.write_text(json.dumps(dict(study, val_split='test')))
    assert 'over the images of test, which' in '\n'.join(markdown_lines(read_studies(results, rows)))
    file.write_text(json.dumps(change(study)))
    with pytest.raises(UserError, match=message) as error:
        read_studies(results, rows)
    assert str(file) in str(error.value)


def test_one_seed_has_no_interval(tmp_path):
    table = small_table(only=['rla'])
    results = Results(tmp_path, table, 2, [])
    for cell in table.cells:
        write_run(results, Run(cell, 0), 90.)
    row = report_rows(results, [0])[-1]
    text = write_markdown(tmp_path / 'r.md', '', [row], 'epoch').read_text()
    assert row.interval is None and 'needs two seeds' in text
