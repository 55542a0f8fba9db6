"""The suites behind the tables of the documentation."""
import pytest
import torch

from timm_rla.benchmark import variants
from timm_rla.benchmark.precision import PRECISIONS
from timm_rla.benchmark.suites import FORMS, SCALING, SUITES


@pytest.mark.parametrize('suite', SUITES)
def test_settings_of_a_suite_differ_and_exist(suite):
    settings = SUITES[suite]
    assert len({tuple(setting.columns().items()) for setting in settings}) == len(settings)
    assert len({setting.name for setting in settings}) == len(settings)
    assert all(setting.precision in PRECISIONS for setting in settings)
    assert not any('folded' in name for setting in settings if setting.mode == 'train' for name in setting.models)


def test_models_of_the_suites_exist():
    for name in {name for settings in SUITES.values() for setting in settings for name in setting.models}:
        with torch.device('meta'):
            variants.create(name.replace('+folded', ''), as_run=False)


def test_scaling_follows_one_axis_at_a_time():
    for name, axes in SCALING.items():
        for points in axes.values():
            assert len({point.value for point in points}) == len(points) >= 3
            assert all(point.model in point.setting.models[1:] and point.setting in SUITES[name] for point in points)
        base = axes['M'][0].setting
        for axis, column in (('batch', 'train_batch_size'), ('pixels', 'train_img_size'), ('depth', 'baseline')):
            for point in axes[axis]:
                differing = {key for key, value in base.columns().items() if point.setting.columns()[key] != value}
                assert differing <= {column}


def test_cells_of_the_cpu_suite():
    """The first ones are those that matter most."""
    ways = ['train-eager-b32-224px', 'train-compiled-b32-224px', 'train-eager-b16-128px', 'infer-eager-b16-224px',
            'infer-eager-b1-224px']
    assert [setting.name for setting in SUITES['cpu']] == [
        f'{name}-{way}' for name in ('resnet18', 'resnet50', 'resnet101') for way in ways]


def test_each_form_is_measured_beside_the_usual_one():
    settings = [setting for suite in FORMS for setting in SUITES[suite]]
    assert all(setting.models[:2] == ('resnet50', 'rla_resnet50') for setting in settings)
    measured = {name for setting in settings for name in setting.models[2:]}
    assert measured == {f'rla_resnet50+{name}' for name, suffix in variants.SUFFIXES.items()
                        if not suffix.create and name != variants.IN_MEMORY}
    assert all(len(setting.models) <= 4 for setting in settings)  # in memory side by side
    for setting in settings:
        of_gpus = any(variants.TRITON in variants.suffixes(name) for name in setting.models)
        assert not of_gpus or (setting.device == 'cuda' and setting.mode == 'train' and not setting.torchcompile)
