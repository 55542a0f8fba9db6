"""The builder: networks, necks, freezing, and the state that enters the last stage of a C4 detector."""
import argparse
import copy

import pytest
import timm
import torch
import torch.nn as nn
from helpers import assert_same
from torchvision.models.detection import FasterRCNN
from torchvision.ops import FrozenBatchNorm2d, roi_align

from timm_rla.common.errors import UserError
from timm_rla.detection import fasterrcnn
from timm_rla.layers import Context
from timm_rla.ops.lstm import lstm_step_reference

NARROW = dict(layers=(1, 1, 1, 1), channels=(8, 16, 32, 64))
SMALL = dict(min_size=64, max_size=96, rpn_post_nms_top_n_train=20, rpn_post_nms_top_n_test=20,
             box_batch_size_per_image=8, pyramid_channels=16, backbone_kwargs=NARROW)
NOT_ZERO = dict(NARROW, zero_init_last=False)  # else the attention has nothing to scale
BACKBONES = ('resnet18', 'seresnet18', 'rla_resnet18', 'rla_seresnet18', 'rla_vector_resnet18')
OTHER_WEIGHTS = 'weights are neither|weights of another network|size mismatch'
IMAGES = [torch.rand(3, 64, 80, generator=torch.Generator().manual_seed(0)),
          torch.rand(3, 80, 64, generator=torch.Generator().manual_seed(1))]
TARGETS = [dict(boxes=torch.tensor([[10., 10, 60, 50]]), labels=torch.tensor([1])),
           dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))]


@pytest.fixture(params=['fpn', 'c4'])
def neck(request):
    return request.param


@pytest.mark.parametrize('backbone', BACKBONES)
def test_trains_and_detects(backbone, neck):
    """All that is to be trained gets a gradient, also from an image without objects; nothing else does."""
    torch.manual_seed(0)
    model = fasterrcnn(backbone, 4, neck, frozen_bn=False, trainable_layers=3, **SMALL)
    assert type(model) is FasterRCNN
    sum(model(IMAGES, TARGETS).values()).backward()
    for name, parameter in model.named_parameters():
        frozen = any(part in name for part in ('body.conv1', 'body.bn1', 'layer1.')) or '.model.conv1' in name \
            or '.model.bn1' in name
        assert parameter.requires_grad != frozen, name
        assert (parameter.grad is None) == frozen, name
    found = model.eval()(IMAGES)
    assert [set(entry) for entry in found] == [{'boxes', 'labels', 'scores'}] * 2


@pytest.mark.parametrize('layers', range(6))
def test_trainable_layers(layers, neck):
    model = fasterrcnn('rla_resnet18', 4, neck, trainable_layers=layers, **SMALL)
    outside = ('rpn', 'fpn.', 'box_head', 'box_predictor')
    trained = {name for name, p in model.named_parameters()
               if p.requires_grad and not any(part in name for part in outside)}
    stages = [f'layer{i}' for i in (1, 2, 3, 4)]
    stages = {stage for stage in [*stages, *(['stage.'] if neck == 'c4' else [])] if any(stage in n for n in trained)}
    expected = {f'layer{i}' for i in range(5 - min(layers, 4), 5)} if layers else set()
    if neck == 'c4' and layers:
        expected = expected - {'layer4'} | {'stage.'}
    assert stages == expected
    assert any('lstm' in name for name in trained) == (layers > 0)


def test_any_network_with_the_strides():
    torch.manual_seed(0)
    for name in ('convnext_atto', 'mobilenetv3_small_050'):
        model = fasterrcnn(name, 4, min_size=64, max_size=96).eval()
        assert len(model(IMAGES)) == 2


def test_weights_of_a_checkpoint_of_classification(neck, tmp_path):
    """Every weight but the classifier's, of a network with another number of classes."""
    trained = timm.create_model('rla_resnet18', num_classes=10, **NARROW).state_dict()
    torch.save(dict(state_dict=trained), tmp_path / 'last.pth.tar')
    model = fasterrcnn('rla_resnet18', 4, neck, pretrained=str(tmp_path / 'last.pth.tar'), frozen_bn=False, **SMALL)
    found = model.state_dict()
    prefix = 'backbone.body.' if neck == 'c4' else 'backbone.body.model.'
    for name, value in trained.items():
        if name.startswith('layer4') and neck == 'c4':
            assert torch.equal(found['roi_heads.box_roi_pool.stage' + name.removeprefix('layer4')], value)
        elif not name.startswith('fc.'):
            assert torch.equal(found[prefix + name], value)
    assert not model.backbone.body.get_parameter(prefix.removeprefix('backbone.body.') + 'layer1.0.conv1.weight'
                                                 ).requires_grad

    (tmp_path / 'last.pth.tar').write_bytes(b'nothing')
    with pytest.raises(UserError, match='no checkpoint'):
        fasterrcnn('rla_resnet18', 4, neck, pretrained=str(tmp_path / 'last.pth.tar'), **SMALL)


@pytest.mark.parametrize('model', ['rla_resnet18', 'resnet18'])
def test_what_a_checkpoint_says_of_its_network(neck, tmp_path, model):
    """It goes with the weights, and into the detector's own checkpoints; what is given here comes first."""
    kwargs = dict(NARROW, context='gmp') if model == 'rla_resnet18' else NARROW
    args = argparse.Namespace(model=model, model_kwargs=kwargs, mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.2])
    path = tmp_path / 'last.pth.tar'
    torch.save(dict(state_dict=timm.create_model(model, **kwargs).state_dict(), args=args), path)
    small = {key: value for key, value in SMALL.items() if key != 'backbone_kwargs'}
    detector = fasterrcnn('rla_resnet18', 4, neck, pretrained=str(path), **small)
    assert detector.transform.image_mean == detector.arguments['image_mean'] == (0.5, 0.4, 0.3)
    assert detector.transform.image_std == (0.2, 0.2, 0.2)
    assert detector.arguments['backbone_kwargs'] == kwargs
    pools = {module.max_pool for module in detector.modules() if isinstance(module, Context)}
    assert pools == {model == 'rla_resnet18'}
    other = fasterrcnn('rla_resnet18', 4, neck, pretrained=str(path), image_mean=(0., 0., 0.), **small)
    assert other.transform.image_mean == (0., 0., 0.)


def test_arguments_that_its_weights_are_too_small_for(tmp_path):
    args = argparse.Namespace(model='rla_resnet18', model_kwargs=dict(NARROW, hidden_dim=10 ** 9))
    torch.save(dict(state_dict=timm.create_model('rla_resnet18', **NARROW).state_dict(), args=args), tmp_path / 'a.pth')
    with pytest.raises(UserError, match='hidden_dim 1000000000, its weights are smaller'):
        fasterrcnn('rla_resnet18', 4, pretrained=str(tmp_path / 'a.pth'))


def test_a_network_without_a_module_for_each_stage():
    with pytest.raises(ValueError, match='trainable_layers: this network has no module'):
        fasterrcnn('mvitv2_tiny', 4, trainable_layers=3, min_size=64, max_size=96)
    assert len(fasterrcnn('mvitv2_tiny', 4, min_size=64, max_size=96).eval()(IMAGES)) == 2


@pytest.mark.parametrize('trained, backbone', [
    ('resnet34', 'resnet18'), ('resnet18', 'resnet34'), ('rla_resnet34', 'rla_resnet18'),
    ('rla_resnet18', 'rla_resnet34'), ('resnet34', 'rla_resnet18'), ('seresnet18', 'resnet18'),
    ('resnet18', 'seresnet18'), ('rla_resnet18', 'resnet18'), ('resnet50', 'resnet18'),
])
def test_weights_of_another_backbone(trained, backbone, neck, tmp_path):
    """Also where all that fits would fit: timm would load as much, and leave the rest as it was."""
    path = str(tmp_path / 'last.pth.tar')
    channels = dict(channels=NARROW['channels'])
    torch.save(dict(state_dict=timm.create_model(trained, num_classes=10, **channels).state_dict()), path)
    with pytest.raises(RuntimeError, match=OTHER_WEIGHTS):
        fasterrcnn(backbone, 4, neck, pretrained=path, **dict(SMALL, backbone_kwargs=channels))


def test_weights_of_another_network_of_timm(tmp_path):
    path = str(tmp_path / 'last.pth.tar')
    torch.save(timm.create_model('efficientnet_b0', num_classes=10).state_dict(), path)
    with pytest.raises(RuntimeError, match=OTHER_WEIGHTS):
        fasterrcnn('efficientnet_b1', 4, pretrained=path)


@pytest.mark.parametrize('backbone', [
    'resnet18', 'mobilenetv3_small_050', 'convnext_atto', 'regnetx_002', 'rla_resnet18'])
def test_weights_of_any_backbone(backbone, tmp_path):
    path = str(tmp_path / 'last.pth.tar')
    plain = backbone.removeprefix('rla_')  # a warm start
    torch.save(timm.create_model(plain, num_classes=10).state_dict(), path)
    fasterrcnn(backbone, 4, pretrained=path)


@pytest.mark.parametrize('arguments, message', [
    (dict(backbone='rla_resnet81'), 'rla_resnet18'),
    (dict(neck='pan'), 'fpn, c4'),
    (dict(backbone='vit_tiny_patch16_224'), 'strides 4, 8, 16 and 32'),
    (dict(backbone='rla_resnet20_cifar', neck='c4'), 'rla_resnet20_cifar'),
    (dict(backbone='convnext_atto', neck='c4'), 'convnext_atto'),
    (dict(num_classes=1), 'num_classes 1'),
    (dict(trainable_layers=6), 'trainable_layers 6'),
    (dict(anchor_sizes=(32, 64)), 'five'),
])
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fasterrcnn(**{'backbone': 'rla_resnet18', **arguments})


@pytest.fixture(params=['rla_resnet18', 'rla_resnet50'])
def c4(request):
    """A detector in float64 whose norms are constants."""
    torch.manual_seed(0)
    return fasterrcnn(request.param, 4, 'c4', **dict(SMALL, backbone_kwargs=NOT_ZERO)).double().eval()


def test_regions_against_the_network(c4):
    """Regions by the stages and the naive LSTM step, one region at a time."""
    backbone, stage = c4.backbone, c4.roi_heads.box_roi_pool
    x = torch.stack([IMAGES[0], IMAGES[1].transpose(1, 2)]).double()
    boxes = [torch.tensor([[0., 0, 32, 32], [8, 4, 60, 40]]).double(), torch.tensor([[30., 20, 70, 60]]).double()]
    maps = backbone(x)
    assert set(maps) == {'0', 'state'}
    found = stage(maps, boxes, [(64, 80)] * 2)

    cell = stage.lstm
    bias = cell.bias_ih + cell.bias_hh

    def step(context, state):
        return lstm_step_reference(context, state, cell.weight_ih, cell.weight_hh, bias)

    body = backbone.body
    y, state = body.maxpool(body.stem(x)), None
    for name in ('layer1', 'layer2', 'layer3'):
        y, state = getattr(body, name)(y, state, step)
    assert_same(maps['0'], y, 1e-10)
    expected = []
    for i, of_image in enumerate(boxes):
        for box in of_image:
            region = roi_align(y[i:i + 1], [box[None]], 7, 1 / 16, sampling_ratio=2)
            expected.append(stage.stage(region, (state[0][i:i + 1], state[1][i:i + 1]), step)[0])
    assert_same(found, torch.cat(expected), 1e-9)
    assert found.shape[2:] == (7, 7)


def test_a_region_depends_on_its_own_image_alone(c4):
    maps = dict(c4.backbone(torch.stack([IMAGES[0], IMAGES[0]]).double()))
    boxes = [torch.tensor([[0., 0, 32, 32]]).double(), torch.tensor([[8., 4, 60, 40], [0, 0, 20, 20]]).double()]
    run = c4.roi_heads.box_roi_pool
    before = run(maps, boxes, [(64, 80)] * 2)
    changed = maps['state'].clone()
    changed[1] += 0.5
    after = run(dict(maps, state=changed), boxes, [(64, 80)] * 2)
    moved = (after - before).abs().amax((1, 2, 3))
    assert moved[0] == 0 and (moved[1:] > 1e-6).all()


def test_no_regions(c4):
    maps = c4.backbone(torch.stack([IMAGES[0], IMAGES[0]]).double())
    none = [torch.zeros(0, 4, dtype=torch.float64)] * 2
    assert len(c4.roi_heads.box_roi_pool(maps, none, [(64, 80)] * 2)) == 0


@pytest.mark.parametrize('training', [False, True])
def test_frozen_batch_norm(training, neck):
    """Constants compute what batch norms with running statistics do, in both modes, layer attention included."""
    torch.manual_seed(0)
    model = fasterrcnn('rla_resnet18', 4, neck, frozen_bn=False, **SMALL).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.normal_(0.5)
            module.running_var.uniform_(0.5, 2)
    torch.manual_seed(0)
    frozen = fasterrcnn('rla_resnet18', 4, neck, frozen_bn=True, **SMALL).double()
    frozen.load_state_dict(copy.deepcopy(model.state_dict()))
    assert any(isinstance(module, FrozenBatchNorm2d) for module in frozen.modules())
    x = torch.stack([IMAGES[0], IMAGES[0].flip(2)]).double()
    model.eval(), frozen.train(training)
    assert_same(dict(frozen.backbone(x)), dict(model.backbone(x)), 1e-9)


@pytest.mark.filterwarnings('ignore:.torch.jit')
def test_torchscript(neck):
    """Scripted, it finds the same; of a size at which torchvision's own resizing rounds alike in both."""
    torch.manual_seed(0)
    model = fasterrcnn('rla_resnet18', 4, neck, **dict(SMALL, min_size=64, max_size=128)).eval()
    images = [torch.rand(3, 64, 96)]
    _, found = torch.jit.script(model)(images)
    for key, value in model(images)[0].items():
        assert_same(found[0][key].float(), value.float(), 1e-4)


def _on_a_line(model, images):
    """The model with its box deltas at zero, so that detections are its anchors, cut at the image."""
    for module in model.modules():
        if hasattr(module, 'bbox_pred'):
            nn.init.zeros_(module.bbox_pred.weight), nn.init.zeros_(module.bbox_pred.bias)
    return model(images)


def test_boxes_are_exact_under_autocast(neck):
    """Anchors on a wide image, whose coordinates the lower precision does not have."""
    torch.manual_seed(0)
    sizes = (21, 33, 65, 129, 257)
    every = dict.fromkeys(('rpn_pre_nms_top_n_test', 'rpn_post_nms_top_n_test', 'box_detections_per_img'), 2000)
    arguments = {**SMALL, **every, 'min_size': 64, 'max_size': 640, 'box_score_thresh': 0., 'rpn_nms_thresh': 1.,
                 'box_nms_thresh': 1.}
    model = fasterrcnn('rla_resnet18', 2, neck, anchor_sizes=sizes, anchor_ratios=(1.,), **arguments).eval()
    with torch.autocast('cpu', torch.bfloat16):
        boxes = _on_a_line(model, [torch.rand(3, 64, 640)])[0]['boxes']
    assert boxes.dtype == torch.float32
    inner = boxes[(boxes[:, 0] > 0) & (boxes[:, 2] < 640)]
    assert len(inner) > 100 and inner[:, 2].max() > 512
    widths = (inner[:, 2] - inner[:, 0])
    nearest = (widths[:, None] - 2 * (torch.tensor(sizes) / 2).round()).abs().min(1).values  # torchvision rounds halves
    assert nearest.max() < 1e-3


def test_small_boxes_train_under_autocast(neck):
    """A box of a pixel far from the origin: in bfloat16 it has no width, and its target is not finite."""
    torch.manual_seed(0)
    model = fasterrcnn('rla_resnet18', 3, neck, frozen_bn=False, **dict(SMALL, min_size=64, max_size=640))
    target = dict(boxes=torch.tensor([[600.3, 10.2, 601.3, 11.2], [301.2, 20., 302.1, 30.]]),
                  labels=torch.tensor([1, 2]))
    with torch.autocast('cpu', torch.bfloat16):
        losses = model([torch.rand(3, 64, 640)], [target])
    assert all(loss.isfinite() for loss in losses.values()), losses
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_box_parts_keep_the_weights_of_torchvision():
    """A checkpoint of its detectors fits: same names, same shapes, same results."""
    from torchvision.models.detection import fasterrcnn_resnet50_fpn
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=5).eval()
    ours = fasterrcnn('resnet50', 5, 'fpn').eval()
    weights = {name: value for name, value in theirs.state_dict().items() if not name.startswith('backbone.body.')}
    missing = ours.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys and all(name.startswith('backbone.body.') for name in missing.missing_keys)
    maps = [torch.rand(2, 256, n, n) for n in (16, 8, 4, 2, 1)]
    for a, b in zip(ours.rpn.head(maps), theirs.rpn.head(maps)):
        assert_same(a, b)
    features = torch.rand(6, 1024)
    assert_same(ours.roi_heads.box_predictor(features), theirs.roi_heads.box_predictor(features))
