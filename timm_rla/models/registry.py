"""The ResNet variants that this package registers with timm: configurations and entry points, nothing else.

Hyper-parameters (N, M, r) are those of the paper, decoded from its parameter counts (docs/paper.md).

No weights of these networks were published. Tags such as `rla_resnet50.backbone_a1_in1k` name weights that timm hosts
for the network without layer attention, here `resnet50.a1_in1k`, from which warm_start.py makes an RLA network with the
same logits and neutral, untrained attention. Their data configuration is that of the source.
"""
from dataclasses import replace
from functools import partial
from typing import Any, Dict, Type

from timm.layers import SEModule
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    list_pretrained,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models.resnet import BasicBlock, ResNet

from .blocks import RLABasicBlock, RLABottleneck
from .cifar import CifarResNet, RLACifarResNet
from .download import fetch_weights
from .features import StageFeatures
from .network import RecurrentLayerAttention, RLAResNet
from .warm_start import checkpoint_filter_fn, plain_name

__all__ = []  # register_model adds each entry point

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)  # of the training images, in [0, 1]
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
CIFAR_DEPTHS = (20, 32, 44, 56, 110)


def _create_resnet(net: Type[ResNet], variant: str, pretrained: bool = False, **kwargs: Any) -> ResNet:
    if pretrained:
        cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
        if cfg.hf_hub_id and not cfg.file and not cfg.state_dict and cfg.source != 'local-dir':
            fetch_weights(cfg.hf_hub_id, cfg.hf_hub_filename, kwargs.get('cache_dir'))
    feature_cfg = dict(out_indices=tuple(range(4 if issubclass(net, CifarResNet) else 5)))
    if issubclass(net, RecurrentLayerAttention):
        kwargs.update(pretrained_filter_fn=checkpoint_filter_fn)
        feature_cfg.update(feature_cls=StageFeatures)
        feature_cls = str(kwargs.get('feature_cls')).lower()
        if feature_cls == 'list':  # timm's calls stages one by one, without the state
            kwargs.pop('feature_cls')
        elif feature_cls == 'dict':
            raise ValueError("feature_cls must be 'list', 'getter', 'hook' or 'fx', not 'dict'")
    return build_model_with_cfg(net, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


def _backbone_cfgs(name: str) -> Dict[str, Any]:
    """Configurations of a model: a tag for each set of ImageNet weights of its source, or that of its source alone."""
    source = plain_name(name)
    default = get_pretrained_cfg(source)
    names = sorted(list_pretrained(f'{source}.*'), key=lambda n: (n != f'{source}.{default.tag}', n))  # default first
    cfgs = {n: get_pretrained_cfg(n) for n in names}
    tags = {
        f'{name}.backbone_{cfg.tag}': replace(cfg, architecture=None, tag=None)
        for cfg in cfgs.values() if cfg.num_classes == 1000
    }
    return tags or {name: replace(default, architecture=None, tag=None)}


def _cifar_cfg() -> Dict[str, Any]:
    return {
        'url': '',
        'num_classes': 10,
        'input_size': (3, 32, 32),
        'pool_size': (8, 8),
        'crop_pct': 1.0,
        'interpolation': 'bilinear',
        'mean': CIFAR10_MEAN,
        'std': CIFAR10_STD,
        'first_conv': 'conv1',
        'classifier': 'fc',
        'license': 'apache-2.0',
    }


_BASIC = dict(block=RLABasicBlock, hidden_dim=128, reduction=8)  # M, r that the paper's count for depth 18 holds
_BOTTLENECK = dict(block=RLABottleneck, hidden_dim=512, reduction=16)  # likewise for depths 50 and 101
_18 = dict(_BASIC, layers=(2, 2, 2, 2))
_50 = dict(_BOTTLENECK, layers=(3, 4, 6, 3))
_101 = dict(_BOTTLENECK, layers=(3, 4, 23, 3))
_IMAGENET = {  # by name: arguments, docstring
    'rla_resnet18': (_18, 'ResNet-18 with layer attention.'),
    'rla_resnet34': (
        dict(_BASIC, layers=(3, 4, 6, 3)),
        'ResNet-34 with layer attention; not in the paper, M and r as for depth 18.'),
    'rla_resnet50': (_50, 'ResNet-50 with layer attention.'),
    'rla_resnet101': (_101, 'ResNet-101 with layer attention.'),
    'rla_resnet152': (
        dict(_BOTTLENECK, layers=(3, 8, 36, 3)),
        'ResNet-152 with layer attention; not in the paper, M and r as for depth 101.'),
    'rla_seresnet18': (dict(_18, attn_layer='se'), 'SE-ResNet-18 with layer attention (IA+RLA).'),
    'rla_seresnet50': (dict(_50, attn_layer='se'), 'SE-ResNet-50 with layer attention (IA+RLA).'),
    'rla_seresnet101': (dict(_101, attn_layer='se'), 'SE-ResNet-101 with layer attention (IA+RLA).'),
    'rla_vector_resnet18': (dict(_18, vector=True), 'ResNet-18 with one layer attention per channel (RLA-vector).'),
    'rla_vector_resnet50': (dict(_50, vector=True), 'ResNet-50 with one layer attention per channel (RLA-vector).'),
    'rla_vector_resnet101': (dict(_101, vector=True), 'ResNet-101 with one layer attention per channel (RLA-vector).'),
    'rla_resnet50d': (
        dict(_50, stem_width=32, stem_type='deep', avg_down=True), 'ResNet-50-D with layer attention.'),
    'rla_resnext50_32x4d': (dict(_50, cardinality=32, base_width=4), 'ResNeXt-50 32x4d with layer attention.'),
}

_CIFAR_RLA = dict(block=RLABasicBlock, hidden_dim=4, reduction=1)
_CIFAR_SE = dict(attn_layer=partial(SEModule, rd_divisor=1))  # C / 16 exactly, where timm would round up to 8
_CIFAR_FAMILIES = {
    'resnet': (CifarResNet, dict(block=BasicBlock)),
    'seresnet': (CifarResNet, dict(block=BasicBlock, **_CIFAR_SE)),
    'rla_resnet': (RLACifarResNet, _CIFAR_RLA),
    'rla_seresnet': (RLACifarResNet, dict(_CIFAR_RLA, **_CIFAR_SE)),
    'rla_vector_resnet': (RLACifarResNet, dict(_CIFAR_RLA, vector=True, hidden_dim=32, reduction=16)),
}

default_cfgs = generate_default_cfgs({
    **{key: cfg for name in _IMAGENET for key, cfg in _backbone_cfgs(name).items()},
    **{f'{family}{depth}_cifar': _cifar_cfg() for family in _CIFAR_FAMILIES for depth in CIFAR_DEPTHS},
})


def _register(name: str, net: Type[ResNet], model_args: Dict[str, Any], doc: str) -> None:
    """Make the entry point of a variant, which timm finds by its name."""
    def entry_point(pretrained: bool = False, **kwargs) -> ResNet:
        return _create_resnet(net, name, pretrained, **dict(model_args, **kwargs))

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__doc__ = doc
    globals()[name] = register_model(entry_point)


for _name, (_args, _doc) in _IMAGENET.items():
    _register(_name, RLAResNet, _args, _doc)
for _family, (_net, _args) in _CIFAR_FAMILIES.items():
    for _depth in CIFAR_DEPTHS:
        # blocks in each of the three stages, two layers each; stem and classifier make up the rest
        _register(f'{_family}{_depth}_cifar', _net, dict(_args, layers=((_depth - 2) // 6,) * 3),
                  f'{_depth} layers for 32 x 32 images; families: {", ".join(_CIFAR_FAMILIES)}')
