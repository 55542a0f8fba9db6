"""Nothing in a step waits for the device: the host never asks for a value, and CUDA graphs capture a step."""
import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from timm_rla.ops.gated_norm import set_form

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
FORMS = [('off', {}), ('on', {}), ('on', dict(context='gmp')), ('on', dict(context='gap_mlp')),
         ('on', dict(vector=True)), ('on', dict(attn_layer='se')), ('on', dict(drop_path_rate=0.2))]


class NoValues(TorchDispatchMode):
    """Fails at every operator that has to know values of a tensor on the host."""

    FORBIDDEN = ('_local_scalar_dense', 'item', 'nonzero', 'masked_select', 'equal', 'is_nonzero', '_unique2')

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f'{name} waits for the device'
        return func(*args, **(kwargs or {}))


def small_model(name='rla_resnet18', device='cpu', **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, hidden_dim=32, num_classes=10, **kwargs).to(device)
    return model, torch.randn(4, 3, 64, 64, device=device)


def train_and_infer(model, x):
    model.train()(x).sum().backward()
    with torch.no_grad():
        return model.eval()(x)


def test_what_waits_is_found():
    with NoValues(), pytest.raises(AssertionError, match='waits for the device'):
        torch.ones(3).sum().item()


@pytest.mark.parametrize('form, kwargs', FORMS, ids=str)
def test_no_value_is_asked_for(form, kwargs):
    set_form(form)
    model, x = small_model(**kwargs)
    with NoValues():
        train_and_infer(model, x)


@needs_gpu
@pytest.mark.parametrize('form, kwargs', [*FORMS, ('triton', {}), ('triton', dict(vector=True))], ids=str)
def test_no_synchronization_on_a_gpu(form, kwargs):
    set_form(form)
    model, x = small_model(device='cuda', **kwargs)
    train_and_infer(model, x)  # libraries set up what they need at the first call
    torch.cuda.set_sync_debug_mode('error')
    try:
        train_and_infer(model, x)
    finally:
        torch.cuda.set_sync_debug_mode('default')


@needs_gpu
@pytest.mark.parametrize('form', ['off', 'on', 'triton'])
def test_a_cuda_graph_captures_a_training_step(form):
    set_form(form)
    model, x = small_model(device='cuda')
    model.train()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model.zero_grad()
            model(x).sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}

    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x).sum().backward()
    graph.replay()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-3)


@needs_gpu
@pytest.mark.parametrize('mode', ['reduce-overhead', 'max-autotune'])
def test_compiled_into_cuda_graphs(mode):
    model, x = small_model(device='cuda')
    model.train()(x).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    for _ in range(3):  # the first ones warm up and capture
        torch.compiler.cudagraph_mark_step_begin()
        model.zero_grad()
        compiled(x).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-3)
