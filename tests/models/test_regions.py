"""The last stage on regions of feature maps, as a C4 detector runs it: as many rows as regions, each with the state of
its image. The weights of the LSTM do not depend on the batch."""
import pytest
import torch
import torch.nn as nn
from helpers import VARIANTS, assert_same, images, randn, tiny_model
from torchvision.ops import roi_align

from timm_rla.ops.gated_norm import set_form
from timm_rla.ops.lstm import lstm_step_reference

INDEX = torch.tensor([0, 0, 1, 0, 1])  # image of each region
BOXES = torch.tensor([
    [0., 0., 32., 32.], [8., 4., 60., 40.], [0., 0., 32., 32.], [30., 20., 96., 64.], [5., 5., 50., 60.],
])


@pytest.fixture(params=VARIANTS)
def model(request):
    return tiny_model('bottleneck', request.param, torch.float64)


def x():
    return images('bottleneck', torch.float64, batch_size=2)


def up_to_layer3(model, x, step):
    x, state = model.maxpool(model.stem(x)), None
    for stage in model.layer1, model.layer2, model.layer3:
        x, state = stage(x, state, step)
    return x, state


def crop(features):
    return roi_align(features, torch.cat([INDEX[:, None].to(BOXES), BOXES], 1).to(features), 4, 1 / 16)


def regions(model, x, step):
    """Output of the last stage for each region [5, C, 2, 2]."""
    features, (h, c) = up_to_layer3(model, x, step)
    y, _ = model.layer4(crop(features), (h[INDEX], c[INDEX]), step)
    return y


def reference_step(model):
    cell = model.lstm
    bias = cell.bias_ih + cell.bias_hh
    return lambda x, state: lstm_step_reference(x, state, cell.weight_ih, cell.weight_hh, bias)


def train(model, form, make_step, steps=2):
    """Losses and gradients of some steps."""
    set_form(form)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (regions(model, x(), make_step(model)) * randn(5, 256, 2, 2, seed=3)).mean()
        loss.backward()
        optimizer.step()
        found.append([loss.detach(), *(p.grad.clone() for name, p in model.named_parameters() if p.grad is not None)])
    return found, {name for name, p in model.named_parameters() if p.grad is not None}


def test_training(model):
    """By the network's own step, by the module and by the naive step: same losses, gradients and weights."""
    start = {name: value.clone() for name, value in model.state_dict().items()}
    ways, results = (('on', lambda model: model.step()), ('on', lambda model: model.lstm), ('off', reference_step)), []
    for form, make_step in ways:
        model.load_state_dict(start)
        found, names = train(model, form, make_step)
        results.append([tensor for step in found for tensor in step] + [p.detach().clone() for p in model.parameters()])
        assert names == {name for name, _ in model.named_parameters() if not name.startswith('fc.')}
    by_network, by_module, by_reference = results
    assert_same(by_network, by_reference, 1e-9)
    assert_same(by_module, by_reference, 1e-9)
    for name, value in model.lstm.named_parameters():
        assert not torch.equal(value, start[f'lstm.{name}'])


def test_a_region_depends_on_the_state_of_its_own_image(model):
    """Norms of the last stage are frozen, as in a detector; else regions see each other through the batch."""
    for module in model.layer4.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    step = model.step()
    features, (h, c) = up_to_layer3(model, x(), step)
    features, h, c = (t.detach() for t in (features, h, c))
    crops = crop(features)
    expected, _ = model.layer4(crops, (h[INDEX], c[INDEX]), step)
    for image in 0, 1:
        changed = h.clone()
        changed[image] += 0.5
        y, _ = model.layer4(crops, (changed[INDEX], c[INDEX]), step)
        difference = (y - expected).abs().amax((1, 2, 3))
        assert (difference[INDEX == image] > 1e-4).all() and (difference[INDEX != image] == 0).all()

    h.requires_grad_(), c.requires_grad_()
    y, _ = model.layer4(crops, (h[INDEX], c[INDEX]), step)
    for region, image in enumerate(INDEX):
        for grad in torch.autograd.grad(y[region].sum(), (h, c), retain_graph=True):
            assert grad[image].any() and not grad[1 - image].any()


def test_one_region_at_a_time(model):
    """One row goes another way than several: as one product."""
    model.eval()
    step = model.step()
    features, (h, c) = up_to_layer3(model, x(), step)
    crops = crop(features)
    together, _ = model.layer4(crops, (h[INDEX], c[INDEX]), step)
    for i, image in enumerate(INDEX):
        alone, _ = model.layer4(crops[i:i + 1], (h[image:image + 1], c[image:image + 1]), step)
        assert_same(alone, together[i:i + 1], 1e-12)


def test_whole_images_as_regions(model):
    """The stages by hand are the network."""
    model.eval()
    step = model.step()
    features, state = up_to_layer3(model, x(), step)
    assert_same(model.layer4(features, state, step)[0], model.forward_features(x()), 1e-12)
