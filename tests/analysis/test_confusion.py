"""Confusion matrix against scikit-learn's, and what is made of it."""
import csv

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix

from timm_rla.analysis.confusion import (
    Confusion,
    format_classes,
    most_confused,
    plot_confusion,
    write_classes,
    write_matrix,
)


@pytest.fixture
def sample():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(6, (400,), generator=generator)  # of 7 classes one has no images
    predicted = torch.where(torch.rand(400, generator=generator) < 0.7, targets, (targets + 2) % 7)
    return targets, predicted


def test_counts(sample):
    confusion = Confusion.of(*sample, 7)
    expected = confusion_matrix(*(part.numpy() for part in sample), labels=range(7))
    np.testing.assert_array_equal(confusion.counts.numpy(), expected)
    with np.errstate(invalid='ignore'):
        np.testing.assert_allclose(confusion.accuracy.numpy(), 100 * expected.diagonal() / expected.sum(1), rtol=1e-6)
    assert [confusion.mistaken_for(index) for index in range(7)] == [2, 3, 4, 5, 6, 0, -1]


def test_tables(sample, tmp_path):
    confusion = Confusion.of(*sample, 7)
    names = [f'class {index}' for index in range(7)]
    with open(write_classes(confusion, names, tmp_path / 'c.csv'), newline='') as f:
        rows = list(csv.DictReader(f))
    assert [int(row['images']) for row in rows] == confusion.images.tolist() and rows[6]['top1'] == ''
    assert float(rows[2]['top1']) == pytest.approx(confusion.accuracy[2].item(), abs=1e-4)
    with open(write_matrix(confusion, names, tmp_path / 'm.csv'), newline='') as f:
        header, *lines = csv.reader(f)
    assert header == ['label', *names] and [list(map(int, line[1:])) for line in lines] == confusion.counts.tolist()
    text = format_classes(confusion, names).splitlines()
    assert len(text) == 7 and text[1].split()[:2] == ['class', '0'] and 'class 2' in text[1]


def test_many_classes(tmp_path):
    counts = torch.diag(torch.full((200,), 50))
    counts[7, 150], counts[150, 7], counts[3, 4] = 9, 5, 20
    confusion = Confusion(counts)
    assert most_confused(confusion, 4) == [3, 4, 7, 150]
    generator = torch.Generator().manual_seed(0)
    for count in (1, 5, 30):  # beside the same, pair by pair
        wrong = torch.randint(0, 3, (60, 60), generator=generator)
        pairs = sorted(((-(wrong[i, j] + wrong[j, i]).item(), i, j) for i in range(60) for j in range(i + 1, 60)))
        expected = list(dict.fromkeys(index for _, *pair in pairs for index in pair))[:count]
        assert most_confused(Confusion(wrong), count) == sorted(expected)
    names = [f'_n{index} $x$' for index in range(200)]
    text = format_classes(confusion, names).splitlines()
    assert text[1].startswith('_n3 $x$') and text[-1] == 'the 20 classes with the lowest accuracy, of 200'
    path = plot_confusion(confusion, names, tmp_path / 'p.svg', 'a $title')
    assert path.stat().st_size > 10000
