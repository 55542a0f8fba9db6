"""timm.models.reparameterize_model on our networks."""
import copy
import gc
import io
import pickle
import weakref

import pytest
import timm
import torch
import torch.nn as nn
from test_models import LAYOUTS, VARIANTS, images, tiny_model
from timm.utils import reparameterize_model

from timm_rla.layers import CONTEXTS
from timm_rla.models.blocks import RecurrentBlock


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def blocks(model):
    return [module for module in model.modules() if isinstance(module, RecurrentBlock)]


@pytest.mark.parametrize('context', CONTEXTS)
@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_same_outputs(layout, variant, context):
    for dtype, tol in (torch.float64, 1e-12), (torch.float32, 1e-5):
        model = tiny_model(layout, variant, dtype, context=context).eval()
        x = images(layout, dtype)
        expected = model(x)
        folded = reparameterize_model(model)
        assert relative_error(folded(x), expected) < tol
        assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
        assert all((block.gates is not None) == (context == 'gap') for block in blocks(folded))
        assert torch.equal(model(x), expected)  # the network itself is as it was
        assert reparameterize_model(model, inplace=True) is model
        assert torch.equal(model(x), folded(x))


@pytest.mark.parametrize('kwargs', [
    dict(stem_type='deep', stem_width=8), dict(avg_down=True), dict(output_stride=8), dict(in_chans=1),
    dict(cardinality=2, base_width=64), dict(act_layer='silu'), dict(norm_layer='groupnorm1'), dict(attn_layer='eca'),
    dict(replace_stem_pool=True), dict(drop_path_rate=0.5), dict(global_pool='max'),
], ids=str)
def test_options_of_timm(kwargs):
    model = tiny_model('bottleneck', dtype=torch.float64, **kwargs).eval()
    x = images('bottleneck', torch.float64, in_chans=kwargs.get('in_chans', 3))
    assert relative_error(reparameterize_model(model)(x), model(x)) < 1e-12


def test_full_size_network():
    torch.manual_seed(0)
    model = timm.create_model('rla_resnet50', zero_init_last=False).eval()
    x = torch.randn(2, 3, 96, 96)
    folded = reparameterize_model(model)
    assert relative_error(folded(x), model(x)) < 1e-5
    for block, planes in zip(blocks(folded), [64] * 3 + [128] * 4 + [256] * 6 + [512] * 3, strict=True):
        assert block.gates.weight.shape == (2048, planes)


def test_features_only():
    model = timm.create_model('rla_resnet18', features_only=True, out_indices=(1, 3), zero_init_last=False).eval()
    x = torch.randn(2, 3, 64, 64)
    for got, expected in zip(reparameterize_model(model)(x), model(x), strict=True):
        assert relative_error(got, expected) < 1e-5


def test_training_mode_says_that_the_network_is_folded():
    model = tiny_model('bottleneck')
    folded = reparameterize_model(model)
    assert model.training and not folded.training  # a network in training is folded for evaluation
    with pytest.raises(RuntimeError, match='folded for inference .* cannot be trained'):
        folded.train()
    with pytest.raises(RuntimeError, match='folded'):
        nn.Sequential(folded).train()
    folded.eval()
    reparameterize_model(folded, inplace=True)  # once more changes nothing
    folded(images('bottleneck'))


def test_copies_and_pickles_fold_themselves():
    model = tiny_model('bottleneck').eval()
    x = images('bottleneck')
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in copy.deepcopy(copy.deepcopy(model)), pickle.loads(pickle.dumps(model)), torch.load(
            file, weights_only=False):
        reparameterize_model(other, inplace=True)
        assert other.folded and not model.folded
        assert relative_error(other(x), model(x)) < 1e-5
    again = pickle.loads(pickle.dumps(other))  # a folded network is one, too
    assert torch.equal(again(x), other(x))


def test_a_network_is_freed_at_once():
    gc.disable()
    try:
        model = tiny_model('bottleneck')
        reference = weakref.ref(model)
        model = reparameterize_model(model)
        assert reference() is None
    finally:
        gc.enable()


def test_compiled_and_scripted():
    model = tiny_model('bottleneck', dtype=torch.float64).eval()
    x = images('bottleneck', torch.float64)
    folded = reparameterize_model(model)
    expected = model(x)
    assert relative_error(torch.jit.script(folded)(x), expected) < 1e-12
    assert relative_error(torch.compile(folded, backend='aot_eager', fullgraph=True)(x), expected) < 1e-12


def test_onnx_export(tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    if tuple(map(int, torch.__version__.split('.')[:2])) < (2, 6):
        pytest.skip('export with dynamo=True needs torch 2.6 here')
    folded = reparameterize_model(tiny_model('bottleneck').eval())
    x = images('bottleneck')
    path = str(tmp_path / 'model.onnx')
    torch.onnx.export(folded, (x,), path, dynamo=True, dynamic_shapes=({0: torch.export.Dim('batch', min=2)},))
    session = onnxruntime.InferenceSession(path)
    for batch in 2, 3, 4:
        got, = session.run(None, {session.get_inputs()[0].name: x[:batch].numpy()})
        assert relative_error(torch.from_numpy(got), folded(x[:batch])) < 1e-5
