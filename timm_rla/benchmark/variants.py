"""Models by name: 'rla_resnet50+hidden_dim=128+folded' is a model of timm, with arguments, in one of its forms.

'rla_resnet50+fpn' is a detector on it.
"""
import ast
import importlib.util
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn
from timm.utils import reparameterize_model

from ..common.errors import UserError, blame
from ..common.networks import build_model
from ..detection.faster_rcnn import NECKS, fasterrcnn
from ..models.blocks import RecurrentBlock
from ..ops.gated_norm import set_form

__all__ = ['FOLDED', 'IN_MEMORY', 'REGIONAL', 'REGIONAL_BACKEND', 'SUFFIXES', 'TRITON', 'create', 'is_detector',
           'recurrent_blocks', 'suffixes']

REGIONAL_BACKEND = 'inductor'
REGIONS = {  # of an image, trained on and classified, by neck: as in the recipes
    'fpn': {},
    'c4': dict(box_batch_size_per_image=256, rpn_post_nms_top_n_test=300),
}


def recurrent_blocks(model: nn.Module) -> List[RecurrentBlock]:
    """Blocks with layer attention, none in a plain network."""
    return [module for module in model.modules() if isinstance(module, RecurrentBlock)]


def _ignore(*args: Any) -> None:
    """A hook that only looks: a module that has one must be called."""


def _fold(model: nn.Module) -> nn.Module:
    return reparameterize_model(model, inplace=True)


def _call_lstm(model: nn.Module) -> nn.Module:
    model.lstm.register_forward_hook(_ignore)
    return model


def _call_norms(model: nn.Module) -> nn.Module:
    for block in recurrent_blocks(model):
        block.tail()[1].register_forward_hook(_ignore)
    return model


def _use_triton(model: nn.Module) -> nn.Module:
    if importlib.util.find_spec('triton') is None:
        raise UserError(f'+{TRITON}: triton is not installed')
    set_form('triton')
    return model


def _compile_tails(model: nn.Module) -> nn.Module:
    for block in recurrent_blocks(model):  # our own method, not a module's forward
        block.attend = torch.compile(block.attend, backend=REGIONAL_BACKEND, dynamic=False, fullgraph=True)
    return model


def _detector(neck: str) -> Callable[[str, Dict[str, Any]], nn.Module]:
    """Creates a detector as it is trained from weights of classification: 3 stages trained, batch norms frozen.

    Its last layers are zero. All backbones then propose the same regions, and as many; with random weights one may have
    three times the regions of another, and that would be what is measured.
    """
    def create_detector(backbone: str, kwargs: Dict[str, Any]) -> nn.Module:
        with blame(f'--model {backbone}+{neck}', ValueError):
            model = fasterrcnn(backbone, neck=neck, trainable_layers=3, backbone_kwargs=kwargs, **REGIONS[neck])
        for head in (model.rpn.head.cls_logits, model.rpn.head.bbox_pred, model.roi_heads.box_predictor.cls_score,
                     model.roi_heads.box_predictor.bbox_pred):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        return model
    return create_detector


def _as_it_is(model: nn.Module) -> nn.Module:
    return model


class Suffix(NamedTuple):
    """A form of a model."""
    apply: Callable[[nn.Module], nn.Module]
    help: str
    create: Optional[Callable[[str, Dict[str, Any]], nn.Module]] = None  # the model of name and arguments
    resizes: bool = False  # changes what the model is, not only how it runs
    plain_too: bool = False  # goes with networks without layer attention


FOLDED, IN_MEMORY, TRITON, REGIONAL = 'folded', 'in_memory', 'triton', 'regional'
SUFFIXES: Dict[str, Suffix] = {  # in the order in which they are applied
    FOLDED: Suffix(_fold, "folded for inference by timm's reparameterize_model", resizes=True, plain_too=True),
    'lstm_called': Suffix(_call_lstm, 'the LSTM is called as a module'),
    'general': Suffix(_call_norms, 'the general form, where the last norm of each block is called as a module'),
    TRITON: Suffix(_use_triton, 'by the Triton kernels in eager mode on a GPU'),
    REGIONAL: Suffix(_compile_tails, 'torch.compile of what follows the last convolution of each block'),
    # the workload looks for this one
    IN_MEMORY: Suffix(_as_it_is, 'with batches that are loaded as `timm-rla train --in-memory` does', plain_too=True),
    **{
        neck: Suffix(_as_it_is, f'Faster R-CNN on it, neck {neck}', _detector(neck), resizes=True, plain_too=True)
        for neck in NECKS
    },
}


def _parse(name: str) -> Tuple[str, Dict[str, Any], List[str]]:
    """Model, arguments and suffixes.

    Raises:
        UserError: A part behind a plus is neither an argument nor a suffix.
    """
    base, *parts = name.split('+')
    kwargs = {}
    for part in parts:
        key, equals, value = part.partition('=')
        if equals:
            kwargs[key] = _value(value)
        elif part not in SUFFIXES:
            raise UserError(f'--model {name}: {part!r} is neither KEY=VALUE nor one of {", ".join(SUFFIXES)}')
    return base, kwargs, [suffix for suffix in SUFFIXES if suffix in parts]


def _value(text: str) -> Any:
    """As timm reads the values of --model-kwargs."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def is_detector(name: str) -> bool:
    """True if a name is that of a detector."""
    return any(SUFFIXES[key].create for key in suffixes(name))


def suffixes(name: str) -> List[str]:
    """The suffixes of a name, keys of `SUFFIXES` in that order.

    Raises:
        UserError: A part of the name is neither an argument nor a suffix.
    """
    return _parse(name)[2]


def create(name: str, as_run: bool = True) -> nn.Module:
    """Create a model, in eval mode on the CPU.

    Args:
        name: A model of timm, then arguments and suffixes, each after a plus, as 'rla_resnet50+hidden_dim=128+folded'.
        as_run: Apply also the suffixes that do not change the model's size. 'triton' among them is a choice for the
            whole process.

    Raises:
        UserError: No such model, argument or suffix, or one that the model cannot have.
    """
    base, kwargs, chosen = _parse(name)
    makers = [SUFFIXES[key].create for key in chosen if SUFFIXES[key].create]
    if makers and len(chosen) > 1:
        raise UserError(f'--model {name}: a detector has no other form, so not {" and ".join(chosen)} together')
    model = (makers[0] if makers else build_model)(base, kwargs).eval()
    for key in chosen:
        suffix = SUFFIXES[key]
        if not suffix.plain_too and not recurrent_blocks(model):
            raise UserError(f'--model {name}: {key!r} is only for networks with layer attention')
        if as_run or suffix.resizes:
            model = suffix.apply(model)
    return model
