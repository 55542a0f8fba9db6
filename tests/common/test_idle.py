"""Options without effect are named, all others are not: what they do is seen on timm's own schedules and losses."""
import pytest
import torch
from helpers import train

from timm_rla.common.idle import BESIDE, UNDER, WITHOUT, idle_options
from timm_rla.common.options import parse
from timm_rla.common.recipes import recipes
from timm_rla.detection.options import train_parser as detect_parser
from timm_rla.train.options import loss_arguments, train_parser
from timm_rla.train.setup import SCHEDULES, create_loss, create_schedule


def idle(*words, parser=train_parser):
    fresh = parser()
    return idle_options(vars(parse(parser(), [str(word) for word in words])),
                        {action.dest: action.default for action in fresh._actions})


@pytest.mark.parametrize('words, reason', [
    (['--clip-mode', 'value'], '--clip-mode has no effect without --clip-grad'),
    (['--amp-dtype', 'bfloat16'], '--amp-dtype has no effect without --amp'),
    (['--model-ema-decay', 0.9], '--model-ema-decay has no effect without --model-ema'),
    (['--torchcompile-mode', 'default'], '--torchcompile-mode has no effect without --torchcompile'),
    (['--mixup-prob', 0.5], '--mixup-prob has no effect without --mixup or --cutmix or --cutmix-minmax'),
    (['--mixup', 0.2, '--mixup-switch-prob', 0.2], '--mixup-switch-prob has no effect without --cutmix'),
    (['--lr', 0.1, '--lr-base', 0.2], '--lr-base has no effect beside --lr'),
    (['--no-aug', '--aa', 'rand-m9'], '--aa has no effect beside --no-aug'),
    (['--train-crop-mode', 'pad', '--scale', 0.5, 1], '--scale has no effect beside --train-crop-mode pad'),
    (['--bce-loss', '--smoothing', 0], '--bce-loss has no effect without'),
    (['--decay-epochs', 3], '--decay-epochs has no effect with --sched cosine, only with step'),
])
def test_named(words, reason):
    found = idle(*words)
    assert len(found) == 1 and found[0].startswith(reason)


@pytest.mark.parametrize('words', [
    [],
    ['--clip-mode', 'value', '--clip-grad', 1],
    ['--layer-decay', 0, '--layer-decay-min-scale', 0.1],  # 0 is a decay
    ['--mixup', 0.2, '--cutmix', 1, '--mixup-switch-prob', 0.2, '--bce-loss', '--bce-sum', '--smoothing', 0],
    ['--lr-base', 0.2, '--amp', '--amp-dtype', 'bfloat16', '--scale', 0.5, 1, '--reprob', 0.1, '--recount', 2],
])
def test_silent(words):
    assert idle(*words) == []


@pytest.mark.parametrize('kind, parser', [('train', train_parser), ('detect train', detect_parser)])
def test_recipes_hold_nothing_idle(kind, parser):
    names = recipes(kind)
    assert names
    for name in names:
        assert idle('--config', name, parser=parser) == []


def test_detectors():
    assert idle('--neck', 'c4', '--pyramid-channels', 64, parser=detect_parser) == [
        '--pyramid-channels has no effect with --neck c4, only with fpn']


def test_every_name_is_an_option():
    from timm_rla.commands.validate import validate_parser
    known = {action.dest for parser in (train_parser(), detect_parser(), validate_parser())
             for action in parser._actions}
    named = {name for names, others in WITHOUT for name in (*names, *others)}
    for names, other, _ in (*BESIDE, *UNDER):
        named |= {*names, other}
    assert named <= known


def _rates(words):
    """Learning rates of 30 epochs by timm's schedule, with a metric that gets no better."""
    options = parse(train_parser(), ['--epochs', '30', '--warmup-epochs', '0', '--lr', '1', '--seed', '0', *words])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=options.lr)
    schedule, epochs = create_schedule(optimizer, options, 'loss', 10)
    rates = []
    for epoch in range(epochs):
        rates.append(optimizer.param_groups[0]['lr'])
        schedule.step(epoch + 1, 1.)
    return rates


@pytest.mark.parametrize('sched', SCHEDULES)
@pytest.mark.parametrize('words', [
    ['--decay-milestones', '5', '9'], ['--decay-epochs', '7'], ['--decay-rate', '0.3'], ['--patience-epochs', '3'],
    ['--lr-k-decay', '0.5'], ['--lr-cycle-limit', '2'], ['--min-lr', '0.5'], ['--cooldown-epochs', '3'],
], ids=lambda words: words[0])
def test_schedules(sched, words):
    """What is named leaves timm's schedule as it is, what is not changes it."""
    base = ['--sched', sched, '--decay-epochs', '10', '--decay-milestones', '10', '20', '--patience-epochs', '5']
    named = any(line.startswith(words[0]) for line in idle('--sched', sched, *words))
    assert (_rates([*base, *words]) == _rates(base)) == named


@pytest.mark.parametrize('base, words', [
    (base, words)
    for base in (['--smoothing', '0'], ['--smoothing', '0.1'], ['--bce-loss', '--smoothing', '0.1'])
    for words in (['--bce-sum'], ['--bce-target-thresh', '0.3'], ['--bce-pos-weight', '2'], ['--bce-loss'])
    if words[0] not in base
], ids=' '.join)
def test_losses(base, words):
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 6), torch.tensor([0, 5, 2, 1])

    def loss(options):
        options = parse(train_parser(), options)
        return create_loss(options.smoothing, False, loss_arguments(options))(logits, targets)

    named = any(line.startswith(f'{words[0]} ') for line in idle(*base, *words))
    assert torch.equal(loss([*base, *words]), loss(base)) == named


def test_training_says_it(image_folder, tmp_path, caplog):
    train(image_folder, tmp_path, '--epochs', '1', '--warmup-epochs', '0', '--clip-mode', 'agc')
    assert '--clip-mode has no effect without --clip-grad' in caplog.text
