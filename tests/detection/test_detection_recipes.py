"""Recipes of detection: every key is an option, every value not its default, schedules by the linear rule."""
import pytest
import timm
import yaml

from timm_rla.common.options import parse
from timm_rla.common.recipes import recipes
from timm_rla.detection.faster_rcnn import NECKS

pytest.importorskip('lightning')

from timm_rla.detection.options import detector_arguments, schedule, train_parser  # noqa: E402

CONFIGS = list(recipes('detect train').values())


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_recipe(path):
    config = yaml.safe_load(path.read_text())
    args, defaults = parse(train_parser(), ['--config', path.stem]), parse(train_parser(), [])
    for key, value in config.items():
        assert getattr(args, key) == value
        assert value != getattr(defaults, key), f'{key} is the default'
    assert args.neck in NECKS and timm.is_model(args.backbone)
    for depth in 50, 101:
        for family in 'resnet', 'seresnet', 'rla_resnet':
            assert timm.is_model(f'{family}{depth}')
    assert detector_arguments(args)['min_size'] == tuple(args.min_size)


def test_numbers_of_the_paper():
    args = parse(train_parser(), ['--config', 'coco_frcnn_c4_paper'])
    plan = schedule(args, 1)
    assert (plan.iterations, plan.lr, plan.milestones, plan.gamma) == (490_000, 1e-3, (350_000,), 0.1)
    assert [size // 16 for size in args.anchor_sizes] == [4, 8, 16, 32] and args.anchor_ratios == [0.5, 1, 2]


def test_the_linear_rule():
    args = parse(train_parser(), ['--config', 'coco_frcnn_fpn_1x'])
    plan = schedule(args, 4)
    assert (plan.iterations, plan.milestones, plan.warmup_iterations) == (360_000, (240_000, 320_000), 4000)
    assert plan.lr == pytest.approx(0.005)
    assert str(plan) == ('360,000 iterations, sgd, learning rate 0.005, times 0.1 at 240,000, 320,000, '
                         'warm-up over 4,000')


@pytest.mark.parametrize('milestones', [[], ['6', '8'], ['2', '2', '7']])
def test_learning_rate(milestones):
    """That of torch's own schedules, one after the other."""
    import torch
    from torch.optim.lr_scheduler import ChainedScheduler, LinearLR, MultiStepLR
    plan = schedule(parse(train_parser(), ['--config', 'coco_frcnn_fpn_1x', '--warmup-iterations', '4', '--milestones',
                                           *milestones]), 16)
    optimizer = plan.optimizer(torch.nn.Linear(2, 2))
    scheduler = ChainedScheduler([
        MultiStepLR(optimizer, list(plan.milestones), plan.gamma),
        LinearLR(optimizer, plan.warmup_factor, total_iters=plan.warmup_iterations)])
    for iteration in range(10):
        assert plan.rate(iteration) == pytest.approx(optimizer.param_groups[0]['lr'], rel=1e-12)
        optimizer.step(), scheduler.step()
