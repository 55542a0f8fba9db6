"""Networks by name: created, or as a checkpoint of a training run names them, with the images that they take."""
import logging
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Type

import timm
import torch
import torch.nn as nn
from timm.models import create_model, get_pretrained_cfg, load_model_config_from_hf

from .._timm import load_model_config_from_path
from .checkpoint import load_weights, read_checkpoint
from .errors import UserError, blame, closest
from .input_spec import InputSpec
from .ranges import check_ranges
from .trained import NOT_ARCHITECTURE, architecture_arguments, check_sizes, training_options

__all__ = [
    'FOLDER', 'Network', 'NetworkSpec', 'SAVED', 'build_model', 'compile_model', 'load_network', 'network_class',
    'restore_network', 'saved_arguments', 'saved_weights', 'trained_spec',
]

_logger = logging.getLogger(__name__)

# What timm and its layers raise for arguments that they reject, and what loading pretrained weights raises
_BUILD_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)


# Arguments of timm.create_model that say what is loaded, or make no classifier
NOT_MODEL = {
    'cache_dir', 'checkpoint_path', 'feature_cls', 'features_only', 'out_indices', 'pretrained', 'pretrained_cfg',
    'pretrained_cfg_overlay', 'pretrained_filter_fn', 'pretrained_strict',
}
RATES = ('drop_rate', 'drop_path_rate', 'drop_block_rate')
OPTIONS = {  # that set arguments of other names
    'global_pool': '--gp', 'drop_rate': '--drop', 'drop_path_rate': '--drop-path', 'drop_block_rate': '--drop-block',
}
FOLDER = 'local-dir:'
SAVED = ('hf-hub:', 'hf_hub:', FOLDER)  # how names of models begin that are saved somewhere, with their weights


@dataclass(frozen=True)
class NetworkSpec:
    """A trained network: its name, its weights and its input."""
    model: Optional[str] = None  # that of the checkpoint if None
    model_kwargs: Dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    checkpoint: str = ''
    use_ema: bool = False
    num_classes: Optional[int] = None
    global_pool: Optional[str] = None
    input: InputSpec = InputSpec()
    use_test_size: bool = True

    def or_hosted(self) -> 'NetworkSpec':
        """With the weights that timm hosts where there is no checkpoint, as timm's validate.py and inference.py."""
        if self.checkpoint or self.model is None or self.model.startswith(SAVED):
            return self
        with blame(f'--model {self.model}', RuntimeError):  # no such tag
            config = get_pretrained_cfg(self.model, allow_unregistered=True)
        return replace(self, pretrained=self.pretrained or config is not None and config.has_weights)

    def completed(self, trained: Dict[str, Any]) -> 'NetworkSpec':
        """The network of a training run, validated as during the run where nothing else is said.

        Training validates at its own input size, never at the size for testing of the network's configuration, and
        crops in the centre.

        Args:
            trained: Options of the run, at least `model`.
        """
        said = {
            name: getattr(self.input, name) or trained.get(name)
            for name in ('mean', 'std', 'crop_pct', 'interpolation')
        }
        said['crop_mode'] = self.input.crop_mode or 'center'
        if self.input.input_size is None:
            run = InputSpec(in_chans=trained.get('in_chans'), input_size=trained.get('input_size'))
            said['in_chans'] = self.input.in_chans or run.channels
            if self.input.img_size is None:
                said.update(img_size=trained.get('img_size'), input_size=run.input_size)
        bn_eps = {} if trained.get('bn_eps') is None else dict(bn_eps=trained['bn_eps'])
        return replace(
            self,
            model=trained['model'],
            model_kwargs={**bn_eps, **(trained.get('model_kwargs') or {}), **self.model_kwargs},
            num_classes=self.num_classes or trained.get('num_classes'),
            global_pool=self.global_pool or trained.get('gp'),
            input=replace(self.input, **said),
            use_test_size=False,
        )


class Network(NamedTuple):
    """A network, timm's data configuration for it, and what its training run says.

    That is the names of its classes by index, and the mode of Pillow that images were converted to.
    """
    name: str
    model: nn.Module
    data_config: Dict[str, Any]
    label_names: Optional[List[str]] = None
    image_mode: Optional[str] = None


def build_model(name: str, model_kwargs: Optional[Dict[str, Any]] = None, **kwargs: Any) -> nn.Module:
    """Create a model.

    Args:
        name: Name of a registered model, 'hf-hub:...' or 'local-dir:...'.
        model_kwargs: What the user gives as --model-kwargs.
        **kwargs: Further arguments of `timm.create_model`.

    Raises:
        UserError: Unknown model or model argument, or a value that the model rejects.
    """
    if not name.startswith(SAVED) and not timm.is_model(name):
        raise UserError(f'--model {name}: no such model (timm.list_models() lists them); '
                        f'{closest(name, timm.list_models())}')
    if kwargs.get('global_pool') == '':
        raise UserError("--gp '': a classifier needs pooling; fast, avg, max, avgmax and avgmaxc are some")
    _check_rates(model_kwargs or {}, '--model-kwargs')
    if name.startswith(SAVED):
        _check_rates(saved_arguments(name), f'--model {name}')
    unsuitable = (model_kwargs or {}).keys() & (kwargs.keys() | NOT_ARCHITECTURE | NOT_MODEL)
    if unsuitable:
        raise UserError(f'--model-kwargs {min(unsuitable)}: not of the architecture, or with an option of its own')
    with blame(f'--model {name}', *_BUILD_ERRORS):
        try:
            return create_model(name, **kwargs, **(model_kwargs or {}))
        except TypeError as e:
            found = re.search(r"unexpected keyword argument '(\w+)'", str(e))
            if found is None:
                raise
            argument = found[1]
            option = f'--model-kwargs {argument}'
            if argument in kwargs:
                option = OPTIONS.get(argument, f'--{argument.replace("_", "-")}')
            elif name.startswith(SAVED) and argument not in (model_kwargs or {}):
                option = f'--model {name}: its model_args have {argument}'
            raise UserError(
                f'{option}: no such argument of {name}; networks with layer attention take '
                "context, context_dim, hidden_dim, reduction, vector, attn_layer and the arguments of timm's ResNet"
            ) from e


def _check_rates(arguments: Dict[str, Any], source: str) -> None:
    """Complain of dropout rates that networks only reject in their forward pass."""
    check_ranges({rate: arguments[rate] for rate in RATES if rate in arguments}, source)


def load_network(spec: NetworkSpec, verbose: bool = False, option: str = '--checkpoint') -> Network:
    """A network as it was trained, on the CPU.

    Args:
        spec: What to load; without a model's name that of the checkpoint, validated as during its training.
        verbose: Log its data configuration.
        option: Option that names the checkpoint, for messages.

    Raises:
        UserError: Unknown model, or a checkpoint that cannot be read or is of another model.
    """
    source = f'{option} {spec.checkpoint}'
    checkpoint = read_checkpoint(spec.checkpoint, option) if spec.checkpoint else None
    if spec.model is None:
        if not training_options(checkpoint or {}, source):
            raise UserError(f'--model: not given, and no {option} of a training run that names it')
        spec = trained_spec(spec, checkpoint, source)
    return restore_network(spec, checkpoint, source, verbose)


def trained_spec(spec: NetworkSpec, checkpoint: Dict[str, Any], source: str) -> NetworkSpec:
    """The network of a checkpoint of a training run, as `NetworkSpec.completed` has it.

    Args:
        spec: What the user says.
        checkpoint: As from `read_checkpoint`.
        source: Option and file, for messages.

    Raises:
        UserError: The checkpoint is damaged or not of a training run, or its model is saved somewhere else.
    """
    trained = training_options(checkpoint, source)
    if not trained:
        raise UserError(f'{source}: not of a training run; it does not say which model it is')
    name = trained['model']
    if name.startswith(SAVED):
        raise UserError(f'{source}: its model is {name!r}, which is never opened for a checkpoint; --model and the '
                        'options of its input say what it is')
    given = trained.get('model_kwargs') or {}
    if given:
        given = architecture_arguments(given, network_class(name), source)
        check_sizes(given, checkpoint['state_dict'], source)
    return spec.completed({**trained, 'model_kwargs': given})


def saved_arguments(name: str) -> Dict[str, Any]:
    """Arguments of a model that is saved somewhere, as its configuration there has them.

    Args:
        name: 'hf-hub:...' or 'local-dir:...'.

    Raises:
        UserError: It has none, or arguments that are not of the architecture.
    """
    source, _, location = name.partition(':')
    load = load_model_config_from_path if f'{source}:' == FOLDER else load_model_config_from_hf
    with blame(f'--model {name}', *_BUILD_ERRORS):
        arguments = dict(load(location)[2] or {})
    unsuitable = arguments.keys() & {*NOT_MODEL, 'device', 'dtype'}
    if unsuitable:
        raise UserError(f'--model {name}: its model_args have {min(unsuitable)}, which is not of the architecture')
    return arguments


def saved_weights(name: str) -> str:
    """File with the weights of a model 'local-dir:...'; the name that it should have if there is none."""
    folder, names = Path(name.removeprefix(FOLDER)), ('model.safetensors', 'pytorch_model.bin')
    return str(folder / next((name for name in names if (folder / name).is_file()), names[0]))


def network_class(name: str) -> Type[nn.Module]:
    """Class of a registered model."""
    try:
        with torch.device('meta'):
            return type(build_model(name))
    except UserError:  # some networks of timm cannot be built without values
        return type(build_model(name))


def restore_network(
        spec: NetworkSpec,
        checkpoint: Optional[Dict[str, Any]],
        source: str,
        verbose: bool = False,
) -> Network:
    """Build a network and load the weights of a checkpoint that has been read, on the CPU.

    Args:
        spec: The network, with its name.
        checkpoint: As from `read_checkpoint`; None for the initial or pretrained weights.
        source: Option and file of the checkpoint, for messages.
        verbose: Log its data configuration.

    Raises:
        UserError: Unknown model, or a checkpoint of another model.
    """
    pretrained = spec.pretrained or spec.model.startswith(SAVED)
    if spec.use_ema and not (checkpoint or {}).get('state_dict_ema'):
        raise UserError('--use-ema: ' + ('without a checkpoint' if checkpoint is None else
                                         f'{source.split(" ", 1)[-1]} holds no EMA weights'))
    if checkpoint is None and spec.model.startswith(FOLDER):  # read as every checkpoint: no code in it is run
        checkpoint = read_checkpoint(saved_weights(spec.model), f'--model {FOLDER}')
        source = f'--model {spec.model}'
        check_sizes(saved_arguments(spec.model), checkpoint['state_dict'], source)
    if verbose and not pretrained and checkpoint is None:
        _logger.warning(f'{spec.model}: random weights; --checkpoint or --pretrained loads trained ones')
    arguments = dict(
        pretrained=pretrained and checkpoint is None,
        num_classes=spec.num_classes,
        in_chans=spec.input.channels,
        global_pool=spec.global_pool,
    )
    if checkpoint is not None:
        _check_shapes(spec, arguments, checkpoint, source)
    model = build_model(spec.model, spec.model_kwargs, **arguments)
    if checkpoint is not None:
        load_weights(model, checkpoint, source, use_ema=spec.use_ema)
    elif verbose and pretrained and spec.num_classes not in (None, model.pretrained_cfg['num_classes']):
        _logger.warning(f'--num-classes {spec.num_classes}: a random classifier, that of the weights has '
                        f'{model.pretrained_cfg["num_classes"]}')
    data_config = spec.input.resolve(model, spec.use_test_size, verbose)
    trained = training_options(checkpoint or {}, source)
    return Network(spec.model, model, data_config, _label_names(model, trained), trained.get('input_img_mode'))


def _check_shapes(spec: NetworkSpec, arguments: Dict[str, Any], checkpoint: Dict[str, Any], source: str) -> None:
    """Complain of weights that do not fit before there is memory for the network, which they may make any size."""
    try:
        with torch.device('meta'):
            model = build_model(spec.model, spec.model_kwargs, **arguments)
    except UserError:
        return  # some networks of timm cannot be built without values
    load_weights(model, checkpoint, source, use_ema=spec.use_ema, assign=True)


def _label_names(model: nn.Module, trained: Dict[str, Any]) -> Optional[List[str]]:
    """Names of a model's classes, as the training run or the Hub has kept them."""
    names = trained.get('label_names') or model.pretrained_cfg.get('label_names')
    if isinstance(names, (list, tuple)) and len(names) == model.num_classes and all(isinstance(n, str) for n in names):
        return list(names)
    return None


def compile_model(model: nn.Module, backend: Optional[str], mode: Optional[str]) -> nn.Module:
    """Compile a model, or return it as it is if no backend is named.

    Raises:
        UserError: No such backend or mode.
    """
    if not backend:
        return model
    with blame(f'--torchcompile {backend}', LookupError, RuntimeError, ValueError):
        return torch.compile(model, backend=backend, mode=mode)
