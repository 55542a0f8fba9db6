"""A network's input: what a user says of it, and what its own configuration says."""
import logging
from dataclasses import dataclass
from typing import Any, Dict, Optional, Sequence

import torch.nn as nn
from timm.data import resolve_data_config

from .errors import UserError, blame, closest
from .ranges import check_ranges

__all__ = ['INTERPOLATIONS', 'InputSpec']

_logger = logging.getLogger(__name__)

CROP_MODES = ('center', 'squash', 'border')  # timm's
INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')


@dataclass(frozen=True)
class InputSpec:
    """What a user says of a network's input; all that is not said comes from the network's own configuration."""
    in_chans: Optional[int] = None
    img_size: Optional[int] = None
    input_size: Optional[Sequence[int]] = None  # channels, height and width
    mean: Optional[Sequence[float]] = None
    std: Optional[Sequence[float]] = None
    interpolation: Optional[str] = None
    crop_pct: Optional[float] = None
    crop_mode: Optional[str] = None

    @property
    def channels(self) -> Optional[int]:
        """Input channels, None if nothing is said."""
        return self.in_chans if self.in_chans is not None else self.input_size[0] if self.input_size else None

    def resolve(self, model: nn.Module, use_test_size: bool = False, verbose: bool = False) -> Dict[str, Any]:
        """timm's data configuration of a network: input_size, mean, std, interpolation, crop_pct and crop_mode.

        Args:
            model: The network.
            use_test_size: Take the size for testing, where the network's configuration has one and nothing is said.
            verbose: Log it.

        Returns:
            The configuration, `input_size` as (channels, height, width), `mean` and `std` in [0, 1] for each channel.

        Raises:
            UserError: Values that do not go together.
        """
        with blame('model input', AssertionError, TypeError, ValueError):
            self._check(model)
            given = dict(vars(self))
            for key in ('mean', 'std'):
                if given[key] is not None and len(given[key]) not in (1, self.channels or len(given[key])):
                    given[key] = (sum(given[key]) / len(given[key]),)  # timm wants one, or one for each channel
            config = resolve_data_config(given, model=model, use_test_size=use_test_size)
            check_ranges({key: config[key] for key in ('mean', 'std')}, 'model input')
            channels = self.channels or config['input_size'][0]
            config['input_size'] = (channels, *config['input_size'][1:])  # timm drops --in-chans if no size is said
            for key in ('mean', 'std'):
                if len(config[key]) != channels:  # the mean over the channels, as timm's prefetcher takes it
                    config[key] = (sum(config[key]) / len(config[key]),) * channels
            self._check_size(model, config['input_size'][1:])
        if verbose:
            _logger.info('Input: ' + ', '.join(f'{key} {value}' for key, value in config.items()))
        return config

    @staticmethod
    def _check_size(model: nn.Module, size: Sequence[int]) -> None:
        """Complain of images of another size than a network of patches was built for."""
        patches = getattr(model, 'patch_embed', None)
        built_for = patches.img_size if getattr(patches, 'strict_img_size', False) else None
        if built_for is not None and tuple(built_for) != tuple(size):
            raise UserError(
                f'images of {size[0]} x {size[1]}: the network is built for {built_for[0]} x {built_for[1]} '
                f'(--img-size {built_for[0]}); --model-kwargs img_size={size[0]} builds it for others')

    def _check(self, model: nn.Module) -> None:
        """Complain of names that timm does not know, and of more or fewer numbers than channels."""
        for name, value, known in (('interpolation', self.interpolation, INTERPOLATIONS),
                                   ('crop-mode', self.crop_mode, CROP_MODES)):
            if value and value not in known:
                raise UserError(f'--{name} {value}: no such way; there are {", ".join(known)}; '
                                f'{closest(value, known)}')
        default = (getattr(model, 'pretrained_cfg', None) or {}).get('input_size') or (3,)
        check_ranges({'input_size': default}, 'model input')
        counts = {1, 3, self.channels or default[0]}  # 3: timm's own, whose mean is taken
        for name, numbers in (('mean', self.mean), ('std', self.std)):
            if numbers is not None and len(numbers) not in counts:
                raise UserError(f'--{name} {" ".join(map(str, numbers))}: {len(numbers)} numbers for '
                                f'{self.channels or default[0]} channels; give one for all or one for each')
