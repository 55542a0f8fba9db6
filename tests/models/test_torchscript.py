"""TorchScript, as for any ResNet of timm: modes, optimisation for inference, files, features, a detector."""
import copy
import io
from typing import Dict, Optional, Tuple

import pytest
import torch
import torch.nn as nn
import torch.nn.utils.prune as prune
from helpers import assert_same, gradients, images, randn, relative_error, tiny_model
from timm.utils import reparameterize_model

from timm_rla.ops.lstm import CellWeights, LSTMState

pytestmark = pytest.mark.filterwarnings('ignore:.torch.jit')

NETWORKS = {'rla': 'bottleneck', 'rla_se': 'basic', 'rla_vector': 'basic'}
X = images('basic', torch.float64)


@pytest.fixture(params=NETWORKS)
def variant(request):
    return request.param


@pytest.fixture(params=[False, True], ids=['', 'folded'])
def folded(request):
    return request.param


def create(variant, folded=False, dtype=torch.float64, **kwargs):
    model = tiny_model(NETWORKS[variant], variant, dtype, **kwargs)
    return reparameterize_model(model.eval()) if folded else model


def assert_same_outputs(scripted, model, tol=1e-12):
    """Calls of several sizes, since the first ones are observed and later ones run what was optimised accordingly."""
    with torch.no_grad():
        for batch_size in 4, 4, 2, 1:
            assert_same(scripted(X[:batch_size]), model(X[:batch_size]), tol)
        x = images('basic', torch.float64, size=(71, 50))
        assert_same(scripted(x), model(x), tol)


@pytest.mark.parametrize('started_in', ['training', 'evaluation'])
def test_modes(variant, started_in):
    """Training and evaluation are set as on the network itself, whatever the mode was when it was scripted."""
    model = create(variant, drop_path_rate=0.2).train(started_in == 'training')
    scripted = torch.jit.script(copy.deepcopy(model))
    for training in True, False, True, False:
        scripted.train(training), model.train(training)
        torch.manual_seed(0)
        expected = gradients(model, X)
        torch.manual_seed(0)
        assert_same(gradients(scripted, X), expected, 1e-10)
        assert_same(dict(scripted.named_buffers()), dict(model.named_buffers()), 1e-12)
    assert_same_outputs(scripted, model)
    with pytest.raises(AssertionError):
        assert_same(scripted.train()(X), model(X), 1e-3)


@pytest.mark.long(but=['rla_se-', 'rla-folded'])
def test_optimised_for_inference(variant, folded):
    model = create(variant, folded).eval()
    assert_same_outputs(torch.jit.optimize_for_inference(torch.jit.script(model)), model)
    single = create(variant, folded, torch.float32).eval()
    optimised = torch.jit.optimize_for_inference(torch.jit.script(single))
    with torch.no_grad():
        for _ in range(3):
            assert relative_error(optimised(X.float()), single(X.float())) < 1e-5


@pytest.mark.long(but=['rla-', 'rla_se-folded', 'rla_vector-'])
def test_saved_and_loaded(variant, folded):
    model, file = create(variant, folded).eval(), io.BytesIO()
    scripted = torch.jit.script(model)
    assert_same_outputs(scripted, model)
    torch.jit.save(scripted, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert_same_outputs(loaded, model)
    assert_same(loaded.state_dict(), model.state_dict())
    assert_same(gradients(loaded, X), gradients(model, X), 1e-10)
    if not folded:
        assert_same(gradients(loaded.train(), X), gradients(model.train(), X), 1e-10)


@pytest.mark.parametrize('layout, out_indices', [
    *(('bottleneck', out_indices) for out_indices in ((0,), (0, 1), (2,), (1, 3), (3, -1))),
    *(('cifar', out_indices) for out_indices in ((0,), (1, 3))),
], ids=str)
def test_features(layout, out_indices, folded):
    model = tiny_model(layout, dtype=torch.float64, features_only=True, out_indices=out_indices).eval()
    if folded:
        model = reparameterize_model(model)
    scripted, x = torch.jit.script(model), images(layout, torch.float64)
    for _ in range(3):
        found = scripted(x)
        assert len(found) == len(out_indices)
        assert_same(found, model(x), 1e-12)


def subclass(model):
    model.lstm.__class__ = type('Other', (type(model.lstm),), {})


def hook(model):
    model.lstm.register_forward_hook(lambda *_: None)


def pruning(model):
    prune.l1_unstructured(model.lstm, 'weight_hh', 0.5)


@pytest.mark.parametrize('change', [subclass, hook, pruning])
def test_an_lstm_that_the_formula_does_not_stand_for_is_an_error(change, folded):
    """In eager mode the module is called, but TorchScript cannot pass a module on from block to block."""
    model = create('rla', folded).eval()
    torch.jit.script(model)
    change(model)
    with pytest.raises(RuntimeError, match='TorchScript takes the LSTM only as a plain'):
        torch.jit.script(model)


class Adapter(nn.Module):
    """A block of another kind, for whose sake folding leaves the LSTM as it is."""

    def forward(
            self,
            x: torch.Tensor,
            state: Optional[LSTMState],
            step: CellWeights,
    ) -> Tuple[torch.Tensor, Optional[LSTMState]]:
        return 2 * x, state


def test_with_a_block_of_another_kind(folded):
    model = create('rla', False).eval()
    model.layer2.append(Adapter())
    if folded:
        model = reparameterize_model(model)
    assert type(model.lstm) is nn.LSTMCell
    assert_same_outputs(torch.jit.script(model), model)


class Backbone(nn.Module):
    """timm's feature maps and a feature pyramid, as torchvision's detectors take them."""

    def __init__(self, body: nn.Module, out_channels: int):
        super().__init__()
        from torchvision.ops import FeaturePyramidNetwork
        self.body = body
        self.out_channels = out_channels
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), out_channels)

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        maps: Dict[str, torch.Tensor] = {}
        for i, feature in enumerate(self.body(x)):
            maps[str(i)] = feature
        return self.fpn(maps)


def detector(variant, folded):
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign
    body = tiny_model(NETWORKS[variant], variant, features_only=True, out_indices=(1, 2, 3, 4))
    if folded:
        body = reparameterize_model(body.eval())
    torch.manual_seed(0)
    return FasterRCNN(
        Backbone(body, 16),
        num_classes=3,
        min_size=64,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(((16,), (32,), (48,), (64,)), ((0.5, 1.0, 2.0),) * 4),
        box_roi_pool=MultiScaleRoIAlign(list('0123'), output_size=3, sampling_ratio=2),
        box_detections_per_img=10,
        rpn_pre_nms_top_n_test=50,
    )


@pytest.mark.long(but=['rla-', 'rla_se-folded'])
@pytest.mark.filterwarnings('ignore:RCNN always returns')
def test_faster_rcnn(variant, folded):
    model = detector(variant, folded).eval()
    scripted = torch.jit.script(model)
    pictures = [randn(3, 64, width, dtype=torch.float32).sigmoid() for width in (64, 80)]
    with torch.no_grad():
        for _ in range(2):
            losses, detections = scripted(pictures)
            assert not losses and len(detections) == 2
            for found, expected in zip(detections, model(pictures), strict=True):
                assert set(found) == {'boxes', 'scores', 'labels'} and len(found['boxes']) > 0
                for key, value in expected.items():
                    torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-3)
    if folded:
        return
    targets = [
        dict(boxes=torch.tensor([[4., 4., 30., 40.]]), labels=torch.tensor([1])),
        dict(boxes=torch.tensor([[20., 10., 60., 50.]]), labels=torch.tensor([2])),
    ]
    model.train(), scripted.train()
    torch.manual_seed(0)  # for the proposals that are drawn
    expected = model(pictures, targets)
    torch.manual_seed(0)
    losses, _ = scripted(pictures, targets)
    assert_same({name: losses[name] for name in expected}, expected, 1e-4)
    sum(losses.values()).backward()
    assert all(p.grad.any() for name, p in scripted.named_parameters() if 'lstm' in name)
