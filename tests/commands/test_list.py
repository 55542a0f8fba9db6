"""`timm-rla list`: what there is."""
import timm
import yaml

import timm_rla_cli as cli
from timm_rla.common.recipes import recipes


def test_models_and_recipes(capsys):
    assert cli.main(['list']) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    for name in ('rla_resnet50', 'rla_vector_resnet56_cifar', 'seresnet110_cifar'):
        assert f'{sum(p.numel() for p in timm.create_model(name).parameters()):,}' in lines[name]
    assert lines['rla_resnet50'].split()[1:4] == ['1024', '512', '16']  # N, M and r of the paper
    assert 'warm start: backbone_a1_in1k and' in lines['rla_resnet50'] and 'resnet50' not in lines
    assert set(recipes()) <= set(lines) and all(yaml.safe_load(path.read_text()) for path in recipes().values())


def test_one_model_with_all_its_weights(capsys):
    assert cli.main(['list', 'rla_seresnet50']) == 0
    row = capsys.readouterr().out.splitlines()[1]
    assert all(name.split('.')[1] in row for name in timm.list_pretrained('rla_seresnet50.*'))
    assert cli.main(['list', 'rla_resnet51']) == 2
    assert 'did you mean rla_resnet' in capsys.readouterr().err
