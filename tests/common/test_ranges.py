"""Numbers out of range are refused at the start, by name and range, from the command line and from a recipe."""
import math

import pytest
import yaml

from timm_rla.common.errors import UserError
from timm_rla.common.options import parse
from timm_rla.common.ranges import RANGES
from timm_rla.common.recipes import recipes
from timm_rla.train.options import train_parser

WRONG = [
    ('val_interval', 0), ('log_interval', 0), ('smoothing', 7.), ('smoothing', 1.), ('drop', 5.), ('drop', -.1),
    ('img_size', 0), ('seed', -1), ('seed', 2 ** 32), ('checkpoint_hist', 0), ('start_epoch', -1), ('batch_size', 0),
    ('workers', -1), ('lr', -.1), ('decay_rate', 0.), ('clip_grad', 0.), ('hflip', 1.5), ('mixup_prob', math.nan),
    ('momentum', math.inf), ('std', [0., 1., 1.]), ('mean', [1.5]), ('num_classes', 0), ('in_chans', -3),
    ('epochs', -1),
    ('recovery_interval', -1), ('input_size', [3, 0, 8]), ('weight_decay', -1e-4), ('model_ema_decay', 1.1),
]


@pytest.mark.parametrize('name, value', WRONG)
def test_out_of_range(tmp_path, name, value):
    option = '--' + name.replace('_', '-')
    words = [str(v) for v in value] if isinstance(value, list) else [str(value)]
    with pytest.raises(UserError, match=f'^{option} .*must be'):
        parse(train_parser(), [option, *words] if not words[0].startswith('-') else [f'{option}={words[0]}'])
    path = tmp_path / 'r.yaml'
    path.write_text(yaml.safe_dump({name: value}))
    with pytest.raises(UserError, match=f'--config .*: {name} .*must be'):
        parse(train_parser(), ['--config', str(path)])


@pytest.mark.parametrize('name, value', [('epochs', True), ('epochs', 2.5), ('batch_size', [1]), ('lr', '1e-x')])
def test_another_type(tmp_path, name, value):
    path = tmp_path / 'r.yaml'
    path.write_text(yaml.safe_dump({name: value}))
    with pytest.raises(UserError, match=name.replace('_', '.')):
        parse(train_parser(), ['--config', str(path)])


@pytest.mark.parametrize('recipe', recipes('train'))
def test_recipes_are_in_range(recipe):
    parse(train_parser(), ['--config', recipe])


def test_every_number_has_a_range():
    """So that an option that is added is thought about."""
    numbers = {action.dest for action in train_parser()._actions if action.type in (int, float)}
    assert numbers - RANGES.keys() == {'local_rank'}
