"""Names of classes: ImageNet's, and what a user may call them."""
import pytest
from timm.data import ImageNetInfo

from timm_rla.analysis import classes
from timm_rla.common.errors import UserError


def test_imagenet_classes():
    names = classes.class_names(1000)
    assert classes.find_class('0', names) == classes.find_class('tench', names) == 0
    assert classes.find_class('Tinca tinca', names) == classes.find_class(names[0], names) == 0
    assert classes.find_class('killer whale', names) == 148
    folders = type('Dataset', (), dict(class_to_idx={s: i for i, s in enumerate(ImageNetInfo().label_names())}))
    assert classes.class_names(1000, folders) == names


@pytest.mark.parametrize('text, words', [
    ('1000', ['1000', '0 to 999']),
    ('-1', ['-1', '0 to 999']),
    ('crane', ['134', '517']),
    ('tensh', ['tensh', 'tench']),
])
def test_bad_class(text, words):
    with pytest.raises(UserError) as e:
        classes.find_class(text, classes.class_names(1000))
    assert all(word in str(e.value) for word in words)


def test_a_name_wins_over_an_index(caplog):
    names = ['0', '1', '10', '2']
    assert [classes.find_class(name, names) for name in names] == [0, 1, 2, 3] and len(caplog.messages) == 1
    assert "--class 2: the class of that name, which has index 3; the one with index 2 is '10'" in caplog.text
    assert classes.find_class('3', names) == 3
    with pytest.raises(UserError, match="--class '': no such class"):
        classes.find_class('', names)
