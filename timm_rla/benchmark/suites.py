"""Settings in which models are measured side by side, and the suites of settings behind the documentation's tables."""
from dataclasses import dataclass, replace
from typing import Any, Dict, Iterable, List, NamedTuple, Tuple

__all__ = ['FORMS', 'SCALING', 'SUITES', 'Point', 'Setting', 'detector_width']


def detector_width(height: int) -> int:
    """Width of images for detectors: a third more than their height, as of photos."""
    return height * 4 // 3


@dataclass(frozen=True)
class Setting:
    """Models and the one way in which all of them run.

    Args:
        models: Names in the notation of `variants.create`; ratios refer to the first.
        mode: 'train' or 'infer'.
        batch_size: Images per step.
        img_size: Their height and width in pixels; for detectors the width is `detector_width`.
        device: 'cpu', 'cuda' or 'cuda:N'.
        precision: A key of `precision.PRECISIONS`.
        channels_last: Use the channels_last memory layout.
        torchcompile: Backend of torch.compile, eager mode if empty.
        torchcompile_mode: Mode of torch.compile, its default if empty.
    """
    models: Tuple[str, ...]
    mode: str
    batch_size: int
    img_size: int
    device: str
    precision: str = 'float32'
    channels_last: bool = False
    torchcompile: str = ''
    torchcompile_mode: str = ''

    @property
    def name(self) -> str:
        """Such as 'resnet50-train-eager-b16-128px'; tells the settings of a suite apart."""
        how = 'compiled' if self.torchcompile else 'eager'
        return f'{self.models[0]}-{self.mode}-{how}-b{self.batch_size}-{self.img_size}px'

    @property
    def device_type(self) -> str:
        """'cpu' or 'cuda'."""
        return self.device.split(':')[0]

    def columns(self) -> Dict[str, str]:
        """What tells the rows of this setting in a table of results."""
        return {
            'mode': self.mode,
            f'{self.mode}_batch_size': str(self.batch_size),
            f'{self.mode}_img_size': str(self.img_size),
            'baseline': self.models[0],
            'precision': self.precision,
            'layout': 'nhwc' if self.channels_last else 'nchw',
            'torchcompile': self.torchcompile,
            'torchcompile_mode': self.torchcompile_mode,
            'device': self.device_type,
        }


class Point(NamedTuple):
    """A value on an axis along which the cost is followed, and the measurement that belongs to it."""
    value: int
    setting: Setting
    model: str


_CPU = dict(device='cpu')
_GPU = dict(device='cuda', precision='amp_bfloat16', channels_last=True)
_COMPILED = dict(torchcompile='inductor')


def _compare(networks: Iterable[str], ways: Iterable[Dict[str, Any]], **common: Any) -> List[Setting]:
    """The plain, the SE and the RLA network of each depth in each way, for inference the folded RLA network, too."""
    return [
        Setting(models=(name, f'se{name}', f'rla_{name}', *[f'rla_{name}+folded'] * (way['mode'] == 'infer')),
                **common, **way)
        for name in networks for way in ways
    ]


def _scaling(batches: Tuple[int, int, int], sizes: Tuple[int, int, int], **common: Any) -> Dict[str, List[Point]]:
    """From depth 50, M = 512 and the batch and image size of the middle on, along each of them alone."""
    rla = 'rla_resnet50'
    models = {
        26: ('resnet26', f'{rla}+layers=(2,2,2,2)'),
        50: ('resnet50', rla),
        101: ('resnet101', 'rla_resnet101'),
        152: ('resnet152', 'rla_resnet152'),
    }
    hidden = {128: f'{rla}+hidden_dim=128', 512: rla, 2048: f'{rla}+hidden_dim=2048'}
    base = Setting(('resnet50', *hidden.values()), mode='train', batch_size=batches[1], img_size=sizes[1], **common)

    def vary(**changes: Any) -> Setting:
        setting = replace(base, **{'models': models[50], **changes})
        return base if setting.columns() == base.columns() else setting  # measured once

    return {
        'depth': [Point(depth, vary(models=names), names[1]) for depth, names in models.items()],
        'batch': [Point(batch, vary(batch_size=batch), rla) for batch in batches],
        'pixels': [Point(size, vary(img_size=size), rla) for size in sizes],
        'M': [Point(dim, base, name) for dim, name in hidden.items()],
    }


def _forms() -> Tuple[List[Setting], List[Setting]]:
    """What each form is worth, by depth 50: on a CPU and on a GPU.

    In eager mode on a GPU the plain name already stands for the general form with the LSTM called as a module, so that
    these two are left out there. Four networks are in memory side by side: for training on a CPU at batch 32 that is
    20 GB, 4.5 for each and 6.5 for the general form.
    """
    plain, rla = 'resnet50', 'rla_resnet50'
    called, general, folded, triton, regional = (
        f'{rla}+{suffix}' for suffix in ('lstm_called', 'general', 'folded', 'triton', 'regional'))
    eager = (plain, rla, called, general)
    compiled = (plain, rla, general)
    inference = (plain, rla, called, folded)
    gpu = dict(batch_size=256, img_size=224, **_GPU)
    return [
        Setting(eager, mode='train', batch_size=32, img_size=224, **_CPU),
        Setting(eager, mode='train', batch_size=16, img_size=128, **_CPU),
        Setting(compiled, mode='train', batch_size=32, img_size=224, **_CPU, **_COMPILED),
        Setting(compiled, mode='infer', batch_size=16, img_size=224, **_CPU, **_COMPILED),
        Setting(inference, mode='infer', batch_size=1, img_size=224, **_CPU),
        Setting(inference, mode='infer', batch_size=16, img_size=224, **_CPU),
    ], [
        Setting((plain, rla, triton, regional), mode='train', **gpu),
        Setting(compiled, mode='train', **gpu, **_COMPILED),
        Setting(compiled, mode='infer', **gpu, **_COMPILED),
        Setting((plain, rla, regional, folded), mode='infer', **gpu),
    ]


def _detectors(train: Dict[str, int], infer: int, **common: Any) -> List[Setting]:
    """Faster R-CNN on the plain, the SE and the RLA network of depth 50; images of a training step by neck."""
    return [
        Setting(tuple(f'{name}+{neck}' for name in ('resnet50', 'seresnet50', 'rla_resnet50')), mode=mode,
                batch_size=batch_size, **common)
        for neck in train for mode, batch_size in (('train', train[neck]), ('infer', infer))
    ]


def _loading(**common: Any) -> List[Setting]:
    """Training on batches that are loaded from memory, beside the bare step."""
    return [Setting((name, f'{name}+in_memory'), mode='train', batch_size=128, img_size=32, **common, **_COMPILED)
            for name in ('resnet20_cifar', 'rla_resnet20_cifar')]


_NETWORKS = ('resnet18', 'resnet50', 'resnet101')
_CIFAR_NETWORKS = ('resnet20_cifar', 'resnet56_cifar')
_CPU_WAYS = (
    dict(mode='train', batch_size=32, img_size=224),
    dict(mode='train', batch_size=32, img_size=224, **_COMPILED),
    dict(mode='train', batch_size=16, img_size=128),
    dict(mode='infer', batch_size=16, img_size=224),
    dict(mode='infer', batch_size=1, img_size=224),
)
_GPU_WAYS = (
    dict(mode='train', batch_size=256, **_COMPILED),
    dict(mode='infer', batch_size=256, **_COMPILED),
    dict(mode='train', batch_size=256),
    dict(mode='infer', batch_size=256),
)
_FORMS_CPU, _FORMS_GPU = _forms()

FORMS = ('forms-gpu', 'forms-cpu')
SCALING: Dict[str, Dict[str, List[Point]]] = {
    'scaling-gpu': _scaling(batches=(16, 64, 256), sizes=(128, 224, 320), **_GPU),
    'scaling-cpu': _scaling(batches=(1, 4, 16), sizes=(96, 160, 256), **_CPU),
}
SUITES: Dict[str, List[Setting]] = {
    'gpu': [
        *_compare(_NETWORKS, _GPU_WAYS, img_size=224, **_GPU),
        *_compare(_CIFAR_NETWORKS, _GPU_WAYS, img_size=32, **_GPU),
    ],
    'cpu': _compare(_NETWORKS, _CPU_WAYS, **_CPU),
    'detection-gpu': _detectors(
        dict(fpn=8, c4=8), infer=8, img_size=800, device='cuda', precision='amp_bfloat16'),
    'detection-cpu': _detectors(dict(fpn=2, c4=1), infer=1, img_size=480, **_CPU),
    'loading-gpu': _loading(**_GPU),
    'loading-cpu': _loading(device='cpu', precision='amp_bfloat16'),
    'forms-gpu': _FORMS_GPU,
    'forms-cpu': _FORMS_CPU,
    **{
        name: list(dict.fromkeys(point.setting for points in axes.values() for point in points))
        for name, axes in SCALING.items()
    },
}
