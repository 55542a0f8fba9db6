"""Libraries that take the name of a timm model take ours: the real ones, where only the installation registers it.

`python test_libraries.py LIBRARY` runs the checks of a library. The test does so in a process of its own, since
conftest.py has imported timm_rla into this one. There is one process for all checks of a library, since imports take
most of the time.
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest

# timm starts each residual branch at zero, where layer attention has neither an effect nor a gradient
ACTIVE = dict(zero_init_last=False)


def images():
    import torch
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def assert_same(actual, expected):
    import torch
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def assert_same_from_file(actual, expected):
    """Not to the bit: transformers leaves weights where the file maps them, and BLAS rounds by their alignment."""
    import torch
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def assert_trains_lstm(loss, model):
    loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if 'lstm.' in name]
    assert len(gradients) == 4 and all(g.isfinite().all() and g.any() for g in gradients)


def plain_weights():
    """Arguments for a warm start of rla_resnet18, from a file instead of the Hub, and the features that it has then."""
    import timm
    from safetensors.torch import save_file
    plain = timm.create_model('resnet18', **ACTIVE).eval()
    save_file(plain.state_dict(), 'plain.safetensors')
    options = dict(pretrained_cfg_overlay=dict(file='plain.safetensors'))
    return options, plain.forward_intermediates(images(), intermediates_only=True)


def backbone_config(**kwargs):
    from transformers import TimmBackboneConfig
    # transformers 4 would load weights without being asked; transformers 5 does not need the argument
    return TimmBackboneConfig(backbone='rla_resnet18', use_pretrained_backbone=False, **kwargs)


def check_transformers_backbone():
    """Feature maps are those of timm, and of the whole network with the same weights."""
    import timm
    import torch
    from transformers import AutoBackbone, TimmBackbone
    backbone = AutoBackbone.from_config(backbone_config(out_indices=[1, 2, 3])).eval()
    assert type(backbone) is TimmBackbone
    assert backbone.channels == [64, 128, 256] and backbone.out_features == ['layer1', 'layer2', 'layer3']

    features = timm.create_model('rla_resnet18', features_only=True, out_indices=(1, 2, 3), **ACTIVE).eval()
    backbone._backbone.load_state_dict(features.state_dict())
    whole = timm.create_model('rla_resnet18').eval()
    missing, unexpected = whole.load_state_dict(features.model.state_dict(), strict=False)
    assert not unexpected and all(name.startswith(('layer4', 'fc')) for name in missing)
    maps = backbone(images()).feature_maps
    assert len(maps) == 3
    for actual, of_features, of_whole in zip(
            maps, features(images()), whole.forward_intermediates(images(), [1, 2, 3])[1]):
        assert_same(actual, of_features)
        assert_same(actual, of_whole)

    everything = TimmBackbone(backbone_config(out_indices=[0, 1, 2, 3, 4])).eval()
    output = everything(images(), output_hidden_states=True)
    assert len(output.hidden_states) == len(output.feature_maps) == 5
    for actual, expected in zip(output.hidden_states, everything(images()).feature_maps):
        assert_same(actual, expected)

    some = TimmBackbone(backbone_config(out_indices=[1, 3])).eval()
    partial = some(images(), output_hidden_states=True)
    assert len(partial.hidden_states) == 4  # up to the last stage that is asked for, as with a plain ResNet
    for actual, expected in zip(partial.feature_maps, some(images()).feature_maps):
        assert_same(actual, expected)

    frozen = TimmBackbone(backbone_config(out_indices=[0, 1, 2, 3, 4], freeze_batch_norm_2d=True)).train()
    frozen.load_state_dict(everything.state_dict(), strict=False)  # it has no counts of batches
    for actual, expected in zip(frozen(images()).feature_maps, output.feature_maps):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)

    options, expected = plain_weights()
    warm = TimmBackbone.from_pretrained('rla_resnet18', out_indices=[0, 1, 2, 3, 4], **options).eval()
    for actual, of_plain in zip(warm(images()).feature_maps, expected):
        assert_same(actual, of_plain)


def check_transformers_networks():
    """Segmentation (UperNet, with save_pretrained and from_pretrained) and detection (DETR) train the LSTM."""
    import torch
    from transformers import DetrConfig, DetrForObjectDetection, UperNetConfig, UperNetForSemanticSegmentation
    backbone = backbone_config(out_indices=[1, 2, 3, 4])

    def activate(model):  # the configuration of a backbone takes no arguments for timm
        for module in model.modules():
            if 'BatchNorm' in type(module).__name__:
                torch.nn.init.ones_(module.weight)
        return model

    config = UperNetConfig(
        backbone_config=backbone,
        hidden_size=16,
        num_labels=3,
        auxiliary_in_channels=256,
        auxiliary_channels=8,
    )
    model = activate(UperNetForSemanticSegmentation(config))
    output = model(images(), labels=torch.ones(2, 64, 64, dtype=torch.long))
    assert output.logits.shape == (2, 3, 64, 64)
    assert_trains_lstm(output.loss, model)
    model.eval().save_pretrained('upernet')
    loaded = UperNetForSemanticSegmentation.from_pretrained('upernet').eval()
    assert_same_from_file(loaded(images()).logits, model(images()).logits)

    config = DetrConfig(
        backbone=None,  # this one and the next two for transformers 4
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone_config=backbone,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=5,
        num_labels=3,
    )
    model = activate(DetrForObjectDetection(config))
    target = dict(class_labels=torch.tensor([1]), boxes=torch.tensor([[0.5, 0.5, 0.2, 0.2]]))
    output = model(pixel_values=images(), labels=[target, target])
    assert output.logits.shape == (2, 5, 4)
    assert_trains_lstm(output.loss, model)


def check_transformers_classification():
    """Logits are those of timm, loss and training work, and a saved network comes back with all its options."""
    import timm
    import torch
    from transformers import (
        AutoModel,
        AutoModelForImageClassification,
        TimmWrapperConfig,
        TimmWrapperForImageClassification,
    )
    options = dict(ACTIVE, context='gmp', context_dim=64, hidden_dim=32, reduction=4, vector=True)
    config = TimmWrapperConfig(architecture='rla_resnet18', num_labels=5, model_args=options)
    model = TimmWrapperForImageClassification(config)

    reference = timm.create_model('rla_resnet18', num_classes=5, **options).eval()
    reference.load_state_dict(model.timm_model.state_dict())
    labels = torch.tensor([0, 3])
    output = model.eval()(pixel_values=images(), labels=labels)
    assert_same(output.logits, reference(images()))
    assert_same(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))

    for checkpointing in (False, True):
        model.train().zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.timm_model.layer1.grad_checkpointing
        assert_trains_lstm(model(pixel_values=images(), labels=labels).loss, model)
    torch.optim.SGD(model.parameters(), lr=0.1).step()

    model.eval().save_pretrained('saved')
    logits = model(images()).logits
    for which in (TimmWrapperForImageClassification, AutoModelForImageClassification):
        loaded = which.from_pretrained('saved').eval()
        assert type(loaded) is TimmWrapperForImageClassification
        assert loaded.timm_model.lstm.hidden_size == 32 and loaded.num_labels == 5
        assert_same_from_file(loaded(images()).logits, logits)

    body = AutoModel.from_pretrained('saved').eval()
    output = body(images(), output_hidden_states=True)
    assert len(output.hidden_states) == 5
    assert_same_from_file(model.timm_model.fc(output.pooler_output), logits)

    # other classes: a new classifier, all other weights are kept
    new = AutoModelForImageClassification.from_pretrained('saved', num_labels=7, ignore_mismatched_sizes=True).eval()
    assert new(images()).logits.shape == (2, 7)
    weights = new.timm_model.state_dict()
    for name, weight in model.timm_model.state_dict().items():
        if not name.startswith('fc.'):
            assert_same(weights[name], weight)


def check_segmentation_models_pytorch():
    import segmentation_models_pytorch as smp
    import timm
    for network in (smp.Unet, smp.DeepLabV3Plus):
        model = network('tu-rla_resnet50', encoder_weights=None, classes=2, **ACTIVE)
        masks = model(images())
        assert masks.shape == (2, 2, 64, 64)
        assert_trains_lstm(masks.square().mean(), model)

        model.eval()
        assert_same(model(images()), model(images()))
        stride = model.encoder.output_stride
        features = timm.create_model('rla_resnet50', features_only=True, output_stride=stride).eval()
        features.load_state_dict(model.encoder.model.state_dict())
        maps = model.encoder(images())[1:]  # the first is the image
        assert len(maps) == 5 and maps[-1].shape == (2, 2048, 64 // stride, 64 // stride)
        for actual, expected in zip(maps, features(images())):
            assert_same(actual, expected)

    for name in ('tu-rla_seresnet18', 'tu-rla_vector_resnet18'):
        assert smp.Unet(name, encoder_weights=None, classes=2)(images()).shape == (2, 2, 64, 64)

    # fewer stages, grey images and options of layer attention, all of which a saved network has again
    model = smp.Unet(
        'tu-rla_resnet18',
        encoder_weights=None,
        encoder_depth=3,
        decoder_channels=(32, 16, 8),
        in_channels=1,
        context='gmp',
        hidden_dim=32,
        reduction=4,
        **ACTIVE,
    ).eval()
    model.save_pretrained('unet')
    loaded = smp.from_pretrained('unet').eval()
    assert loaded.encoder.model.model.lstm.hidden_size == 32
    assert_same(loaded(images()[:, :1]), model(images()[:, :1]))

    options, expected = plain_weights()
    warm = smp.Unet('tu-rla_resnet18', encoder_weights=True, **options).eval()
    for actual, of_plain in zip(warm.encoder(images())[1:], expected):
        assert_same(actual, of_plain)


def check_fastai():
    """A learner by the name of a model trains, LSTM included; exported and loaded, it predicts the same."""
    import numpy as np
    import torch
    from fastai.vision.all import ImageDataLoaders, accuracy, create_timm_model, load_learner, vision_learner
    from PIL import Image
    generator = np.random.default_rng(0)
    for split in ('train', 'valid'):
        for label in 'abc':
            folder = Path(split, label)
            folder.mkdir(parents=True)
            for index in range(4):
                Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype='uint8')).save(folder / f'{index}.png')

    model, cfg = create_timm_model('rla_resnet18', 3, pretrained=False, hidden_dim=32, **ACTIVE)
    assert cfg['input_size'] == (3, 224, 224) and model[0].model.lstm.hidden_size == 32
    logits = model(images())
    assert logits.shape == (2, 3)
    assert_trains_lstm(logits.square().sum(), model)

    options, expected = plain_weights()
    warm, _ = create_timm_model('rla_resnet18', 3, pretrained=True, **options)
    assert_same(warm.eval()[0](images()), expected[-1])

    loaders = ImageDataLoaders.from_folder('.', bs=6, num_workers=0, device=torch.device('cpu'))
    learner = vision_learner(loaders, 'rla_resnet18', pretrained=False, metrics=accuracy, **ACTIVE)
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    with learner.no_bar():
        learner.fit(1)
        assert len(learner.recorder.losses) == 2 and torch.stack(learner.recorder.losses).isfinite().all()
        after = dict(learner.model.named_parameters())
        assert len([name for name in before if 'lstm.' in name]) == 4
        assert not [name for name, p in before.items() if torch.equal(p, after[name])]

        learner.export('learner.pkl')
        loaded = load_learner('learner.pkl')
        with loaded.no_bar():
            assert_same(loaded.predict('valid/a/0.png')[2], learner.predict('valid/a/0.png')[2])


def check_torchvision_faster_rcnn():
    """The recipe of torchvision's own detectors: a feature pyramid on top of timm's feature extractor."""
    import timm
    import torch
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

    class Backbone(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = timm.create_model('rla_resnet18', features_only=True, out_indices=(1, 2, 3, 4), **ACTIVE)
            self.out_channels = 32
            self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), self.out_channels)

        def forward(self, x):
            return self.fpn(dict(zip('0123', self.body(x))))

    torch.manual_seed(0)
    model = FasterRCNN(
        Backbone(),
        num_classes=3,
        min_size=64,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(((16,), (32,), (48,), (64,)), ((0.5, 1.0, 2.0),) * 4),
        box_roi_pool=MultiScaleRoIAlign(list('0123'), output_size=7, sampling_ratio=2),
    )
    batch = [torch.rand(3, 64, 64), torch.rand(3, 64, 80)]
    targets = [
        dict(boxes=torch.tensor([[4.0, 4.0, 30.0, 40.0]]), labels=torch.tensor([1])),
        dict(boxes=torch.tensor([[20.0, 10.0, 60.0, 50.0]]), labels=torch.tensor([2])),
    ]
    losses = model(batch, targets)
    assert set(losses) == {'loss_classifier', 'loss_box_reg', 'loss_objectness', 'loss_rpn_box_reg'}
    assert_trains_lstm(sum(losses.values()), model)
    with torch.no_grad():
        for detections in model.eval()(batch):
            assert detections['boxes'].shape == (len(detections['scores']), 4)


CHECKS = {
    'transformers': (
        check_transformers_backbone,
        check_transformers_networks,
        check_transformers_classification,
    ),
    'segmentation_models_pytorch': (check_segmentation_models_pytorch,),
    'fastai': (check_fastai,),
    'torchvision': (check_torchvision_faster_rcnn,),
}


@pytest.mark.long
@pytest.mark.parametrize('library', CHECKS)
def test_library(library, tmp_path):
    pytest.importorskip(library, reason=f'{library} is not installed')
    # Offline: nothing here may depend on what the Hub holds, nor wait for it
    environment = dict(os.environ, HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1')
    command = [sys.executable, '-W', 'ignore', str(Path(__file__).resolve()), library]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


if __name__ == '__main__':
    import torch
    assert 'timm_rla' not in sys.modules  # what is tested is the registration by the installation
    for check in CHECKS[sys.argv[1]]:
        torch.manual_seed(0)
        check()
