"""Models by name: arguments, and the forms that a suffix asks for."""
import pytest
import torch
import torch.nn as nn
from torchvision.models.detection import FasterRCNN

from timm_rla.benchmark import variants
from timm_rla.benchmark.variants import SUFFIXES, create, is_detector, recurrent_blocks
from timm_rla.common.errors import UserError
from timm_rla.models.blocks import RecurrentBlock
from timm_rla.ops.gated_norm import form
from timm_rla.ops.lstm import CellWeights, FoldedCell, step_function

SMALL = 'rla_resnet20_cifar+layers=(1,1,1)'


@pytest.fixture
def fused(monkeypatch):
    """The blocks that took the fused form."""
    blocks = []
    attend = RecurrentBlock.attend_fused
    monkeypatch.setattr(
        RecurrentBlock, 'attend_fused', lambda self, *args: blocks.append(self) or attend(self, *args))
    return blocks


def seeded(name, training):
    torch.manual_seed(0)
    return create(name).train(training)


def results(name, training=True):
    """Logits and gradients of a model with seeded weights."""
    model = seeded(name, training)
    torch.manual_seed(1)
    logits = model(torch.randn(2, 3, 32, 32))
    if training:
        logits.square().sum().backward()
    return [logits, *(p.grad for p in model.parameters() if training)]


def test_arguments():
    model = create('rla_resnet20_cifar+hidden_dim=8+layers=(1,1,1)+context=gmp')
    assert model.lstm.hidden_size == 8 and len(model.layer1) == 1 and not model.training
    assert model.layer1[0].context.max_pool


def test_folded():
    torch.testing.assert_close(results(f'{SMALL}+folded', False), results(SMALL, False))
    assert isinstance(create(f'{SMALL}+folded').lstm, FoldedCell)
    assert isinstance(create('resnet20_cifar+folded'), nn.Module)  # of a plain network, nothing is folded


@pytest.mark.parametrize('suffix', ['lstm_called', 'general', 'lstm_called+general', 'general+lstm_called'])
def test_called_modules(suffix, fused):
    expected = results(SMALL)
    assert len(fused) == 3
    fused.clear()
    torch.testing.assert_close(results(f'{SMALL}+{suffix}'), expected)
    assert len(fused) == (0 if 'general' in suffix else 3)
    model = create(f'{SMALL}+{suffix}')
    assert isinstance(step_function(create(SMALL).lstm), CellWeights)
    assert (step_function(model.lstm) is model.lstm) == ('lstm_called' in suffix)
    norms = [block.tail()[1] for block in recurrent_blocks(model)]
    hooked = [module for module in model.modules() if module._forward_hooks]
    assert hooked == norms * ('general' in suffix) + [model.lstm] * ('lstm_called' in suffix)


@pytest.mark.long
def test_general_form_does_not_pool_early_when_compiled():
    for suffix, channels in ('', [8, 16, 32, 64]), ('+general', [32, 64, 128, 256]):
        torch._dynamo.reset()  # of torch 2.5 it takes no notice of hooks, and would take the first graph again
        model = create(f'rla_resnet50+layers=(1,1,1,1)+channels=(8,16,32,64){suffix}')
        pooled = []
        for block in recurrent_blocks(model):
            block.context.pool = lambda x, pooled=pooled: pooled.append(x.shape[1]) or x.mean((2, 3))
        torch.compile(model, backend='eager')(torch.randn(1, 3, 64, 64))
        assert pooled == channels


def test_compiled_tails(monkeypatch, fused):
    graphs = []
    monkeypatch.setattr(
        variants, 'REGIONAL_BACKEND', lambda module, inputs: graphs.append(module) or module.forward)
    expected = results(SMALL)
    fused.clear()
    torch.testing.assert_close(results(f'{SMALL}+regional'), expected, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 3


@pytest.mark.long
def test_compiled_tails_of_a_large_network_are_shared(monkeypatch):
    """One graph for the first and one for the other blocks of each stage: as many as torch compiles of one function."""
    graphs = []
    monkeypatch.setattr(
        variants, 'REGIONAL_BACKEND', lambda module, inputs: graphs.append(module) or module.forward)
    create('rla_resnet50+regional').train()(torch.randn(2, 3, 32, 32))
    assert len(graphs) == 8


def test_triton_is_chosen_for_the_process_that_runs_the_model(monkeypatch):
    monkeypatch.setattr(variants.importlib.util, 'find_spec', lambda name: name)
    create(f'{SMALL}+triton', as_run=False)
    assert form() == 'on'
    create(f'{SMALL}+triton')
    assert form() == 'triton'
    monkeypatch.setattr(variants.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='triton is not installed'):
        create(f'{SMALL}+triton')


def test_size_alone():
    plain = create(f'{SMALL}+general+lstm_called+regional+triton', as_run=False)
    assert not any(module._forward_hooks for module in plain.modules()) and form() == 'on'
    assert not any('attend' in vars(block) for block in recurrent_blocks(plain))
    assert isinstance(create(f'{SMALL}+folded+regional', as_run=False).lstm, FoldedCell)


@pytest.mark.parametrize('suffix', [name for name, suffix in SUFFIXES.items() if not suffix.plain_too])
def test_forms_of_layer_attention_need_one(suffix):
    for as_run in False, True:
        with pytest.raises(UserError, match=f"resnet20_cifar.*'{suffix}' is only for networks with layer attention"):
            create(f'resnet20_cifar+{suffix}', as_run)


@pytest.mark.parametrize('neck, regions', [('fpn', (512, 1000)), ('c4', (256, 300))])
def test_detectors(neck, regions):
    """As they are trained from weights of classification: batch norms are constants, 3 stages and more are trained."""
    model = create(f'rla_resnet18+hidden_dim=16+{neck}')
    assert type(model) is FasterRCNN and not model.training
    assert any(isinstance(m, nn.LSTMCell) and m.hidden_size == 16 for m in model.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    body = model.backbone.body
    frozen = [name for name, p in body.named_parameters() if not p.requires_grad]
    assert any('conv1' in name for name in frozen) and not any('layer3' in name for name in frozen)
    sampler, rpn = model.roi_heads.fg_bg_sampler, model.rpn
    assert (sampler.batch_size_per_image, rpn.post_nms_top_n()) == regions
    assert is_detector(f'rla_resnet18+{neck}') and not is_detector('rla_resnet18+folded')


@pytest.mark.parametrize('neck', ['fpn', 'c4'])
def test_detectors_propose_the_same_regions(neck):
    images = [torch.rand(3, 96, 128)]
    proposals = []
    for name in ('resnet18', 'seresnet18', 'rla_resnet18'):
        model = create(f'{name}+layers=(1,1,1,1)+channels=(8,16,24,32)+{neck}')
        model.transform.min_size = (96,)
        model.rpn.register_forward_hook(lambda module, args, output: proposals.append(output[0][0]))
        with torch.no_grad():
            model(images)
    assert len(proposals[0]) > 10
    assert all(torch.equal(boxes, proposals[0]) for boxes in proposals)


@pytest.mark.parametrize('name', [
    'resnet18+fpn+c4', 'rla_resnet18+folded+fpn', 'vit_tiny_patch16_224+fpn', 'resnet18+nonsense=1+fpn'])
def test_detectors_that_are_not_possible(name):
    with pytest.raises(UserError, match=name.split('+')[0]):
        create(name)


def test_unknown_suffix_names_the_allowed_ones():
    with pytest.raises(UserError) as error:
        create('rla_resnet20_cifar+generall')
    assert all(word in str(error.value) for word in ("'generall'", 'KEY=VALUE', *SUFFIXES))
    assert variants.suffixes('x+triton+a=1+folded') == ['folded', 'triton']
