"""The Triton kernels without a GPU: run by Triton's interpreter, compiled for GPUs that are not there.

Triton settles at its first import whether it interprets, so that each way has a process of its own.
"""
import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from timm_rla.ops.gated_norm import triton as kernels

needs_triton = pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='triton is not installed')

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FORMATS = (torch.contiguous_format, torch.channels_last)
SHAPES = ((2, 3, 5, 7), (1, 1, 1, 1), (2, 5, 1, 1), (3, 1, 4, 4), (1, 16, 1, 33))
PASSES = {
    'statistics': ('z',),
    'apply': ('z', 'mean', 'scale', 'shift', 'shortcut'),
    'reduce': ('grad', 'out', 'z', 'mean'),
    'combine': ('grad', 'z', 'mean', 'scale', 'shift', 'k3'),
}

PROBE = '''
import sys
import torch
import triton
import triton.language as tl
from timm_rla.ops.gated_norm import triton as kernels

@triton.jit
def copy(x, y):
    tl.store(y, tl.load(x))

x, y = torch.ones(1), torch.zeros(1)
copy[(1,)](x, y)
if not y:  # Triton 3.1 with NumPy 2: reads and writes nothing
    sys.exit(77)
'''

INTERPRET = '''
results = []
for tile, tiles, inputs, passes in torch.load(sys.argv[1], weights_only=True):
    kernels.TILE, kernels.MIN_TILES = tile, tiles
    assert kernels.available(inputs['z'])
    results.append({name: getattr(kernels, name)(*[inputs[i] for i in names]) for name, names in passes.items()})
torch.save(results, sys.argv[2])
'''

NETWORK = '''
import importlib
import timm
from timm_rla.ops.gated_norm import cpu, fused

importlib.reload(kernels)  # without the small tiles of the cases above
torch.manual_seed(0)
args = dict(layers=(1, 1, 1, 1), channels=(4, 8, 8, 8), hidden_dim=4, reduction=1, num_classes=3, zero_init_last=False)
model = timm.create_model('rla_resnet50', **args).double()
x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
gradients, calls = [], []
for passes in cpu, kernels:
    fused._eager_passes = lambda z: calls.append(passes) or passes
    model.zero_grad()
    model(x).square().sum().backward()
    gradients.append([p.grad for p in model.parameters()])
assert calls == [cpu] * 4 + [kernels] * 4
torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
'''

COMPILE = '''
import sys
import torch
import triton
from triton.backends.compiler import GPUTarget
from timm_rla.ops.gated_norm import triton as kernels

class Driver:
    """What Triton asks of a driver before it compiles."""
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0
    def get_current_target(self):
        return GPUTarget('cuda', int(sys.argv[1]), 32)

def launch(kernel, programs, *args, **constants):
    compiled.add(kernel.warmup(*args, grid=(programs,), **constants, **kernels.OPTIONS))

def compile_all(shape, dtype, memory_format):
    z = torch.zeros(shape, dtype=dtype).contiguous(memory_format=memory_format)
    row = torch.zeros(shape[:2], dtype=torch.promote_types(dtype, torch.float32))
    kernels.statistics(z)
    kernels.apply(z, row, row, row, z)
    kernels.reduce(z, z, z, row)
    kernels.combine(z, z, row, row, row, row)

triton.runtime.driver.set_active(Driver())
kernels._launch = launch
compiled = set()
large, *small = (2, 64, 56, 56), (2, 3, 5, 5), (2, 1, 1, 1)
for dtype in sys.argv[2:]:
    dtype = getattr(torch, dtype)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        compile_all(large, dtype, memory_format)
        before = len(compiled)
        compile_all((6, *large[1:]), dtype, memory_format)
        assert len(compiled) == before, 'compiled anew for another batch size'
        if dtype is torch.bfloat16:
            for shape in small:
                compile_all(shape, dtype, memory_format)
assert all(kernel.asm['cubin'] for kernel in compiled)
names = {kernel.name for kernel in compiled}
assert names == {'_statistics', '_merge_statistics', '_apply', '_reduce', '_combine'}, names
'''


def run(script, *args, **env):
    return subprocess.run(
        [sys.executable, '-c', script, *map(str, args)], env={**os.environ, **env}, capture_output=True, text=True)


def interpret(script, *args):
    process = run(PROBE + script, *args, TRITON_INTERPRET='1')
    if process.returncode == 77:
        pytest.skip("this Triton's interpreter does not work with this NumPy")
    assert process.returncode == 0, process.stderr


def sample(shape, dtype, memory_format, offset=0.):
    """Arguments of the four passes: z in one layout, the others in the other one, some NaN and some exact zeros."""
    generator = torch.Generator().manual_seed(0)
    other = FORMATS[memory_format is FORMATS[0]]

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def feature_map(layout):
        return normal(*shape).to(dtype).contiguous(memory_format=layout)

    inputs = {name: feature_map(other) for name in ('shortcut', 'grad')}
    inputs['z'] = feature_map(memory_format) + offset
    inputs['out'] = feature_map(other).relu()
    for name in ('mean', 'scale', 'shift', 'k3'):
        inputs[name] = normal(*shape[:2]).to(torch.promote_types(dtype, torch.float32))
    inputs['mean'] += offset
    if shape[0] > 1:
        inputs['z'][0, 0, 0, 0] = inputs['out'][1, 0, 0, 0] = torch.nan
    return inputs


def cases():
    """Tile in bytes, least number of tiles in a part, arguments."""
    for memory_format in FORMATS:
        for dtype in DTYPES:
            yield kernels.TILE, kernels.MIN_TILES, sample(SHAPES[0], dtype, memory_format)
        for shape in SHAPES[1:]:
            yield kernels.TILE, kernels.MIN_TILES, sample(shape, torch.float32, memory_format)
    # Several tiles for a program, several programs along H and W, last ones that are not full; a mean far from zero
    for dtype, offset in ((torch.bfloat16, 0.), (torch.float32, 300.)):
        for memory_format in FORMATS:
            yield 32 * dtype.itemsize, 2, sample((2, 5, 9, 11), dtype, memory_format, offset)


def expected(inputs):
    """The passes by torch in float64, g in its own precision."""
    wide = {name: x.double() if x.dim() == 4 else x.double()[:, :, None, None] for name, x in inputs.items()}
    centred = wide['z'] - wide['mean']
    var, mean = torch.var_mean(wide['z'], (2, 3), correction=0)
    g = torch.ops.aten.threshold_backward(inputs['grad'], inputs['out'], 0)
    return {
        'statistics': (mean, var),
        'apply': (centred * wide['scale'] + wide['shift'] + wide['shortcut']).relu(),
        'reduce': (g, g.double().sum((2, 3)), (g.double() * centred).sum((2, 3))),
        'combine': wide['grad'] * wide['scale'] + centred * wide['shift'] + wide['k3'],
    }


def check(inputs, results):
    z = inputs['z']
    case = f'{tuple(z.shape)}, {z.dtype}, strides {z.stride()}'
    precise = torch.promote_types(z.dtype, torch.float32)
    rows = {'rtol': 1e-5, 'atol': 1e-5} if precise == torch.float32 else {'rtol': 1e-12, 'atol': 1e-12}
    # The interpreter cuts bfloat16 off where a GPU rounds, so that an error may be that of the last bit
    maps = rows if z.dtype == precise else {'rtol': torch.finfo(z.dtype).eps, 'atol': torch.finfo(z.dtype).eps}
    for name, wanted in expected(inputs).items():
        found = results[name]
        single = isinstance(found, torch.Tensor)
        for i, (x, y) in enumerate(zip([found] if single else found, [wanted] if single else wanted)):
            what = f'{name}[{i}] of {case}'
            is_map = x.dim() == 4
            assert x.dtype == (z.dtype if is_map else precise), what
            if is_map:
                assert x.stride() == z.stride(), what
            torch.testing.assert_close(
                x.double(), y.double(), **(maps if is_map else rows), equal_nan=True,
                msg=lambda message, what=what: f'{what}: {message}')
    assert torch.equal(results['reduce'][0].nan_to_num(), expected(inputs)['reduce'][0].nan_to_num()), case


@pytest.mark.long
@needs_triton
def test_interpreted(tmp_path):
    """Every pass agrees with torch: dtypes, layouts, odd sizes, NaN, split sums, a mean far from zero.

    In the same process, which takes seconds to start: gradients of a network are those by the passes for a CPU.
    """
    asked = list(cases())
    torch.save([(*case, PASSES) for case in asked], tmp_path / 'cases.pt')
    interpret(INTERPRET + NETWORK, tmp_path / 'cases.pt', tmp_path / 'results.pt')
    results = torch.load(tmp_path / 'results.pt', weights_only=True)
    assert len(results) == len(asked)
    for (_, _, inputs), result in zip(asked, results):
        check(inputs, result)


@pytest.mark.long
@needs_triton
@pytest.mark.parametrize('arch, dtypes', [(80, ('bfloat16',)), (90, ('float16', 'float32', 'float64'))])
def test_compiled(arch, dtypes, tmp_path):
    """Every kernel compiles to machine code for both layouts, and not anew for another batch size."""
    process = run(COMPILE, arch, *dtypes, TRITON_INTERPRET='0', TRITON_CACHE_DIR=str(tmp_path))
    assert process.returncode == 0, process.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@needs_triton
def test_on_gpu():
    for _, _, inputs in cases():
        inputs = {name: x.cuda() for name, x in inputs.items()}
        assert kernels.available(inputs['z'])

        def passes(inputs=inputs):
            return {name: getattr(kernels, name)(*[inputs[i] for i in names]) for name, names in PASSES.items()}

        results = passes()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = passes()
        graph.replay()
        check(inputs, results)
        torch.testing.assert_close(again, results, rtol=0, atol=0, equal_nan=True)


@needs_triton
@pytest.mark.parametrize(
    'shape', [(256, 256, 56, 56), (1, 64, 1024, 1024), (8, 3, 224, 224), (1, 1, 1, 1), (70000, 16, 1, 1)])
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('split', [False, True])
def test_grid_covers(shape, memory_format, split):
    """The parts of a feature map cover it, none is empty, and reductions leave few to merge."""
    z = torch.empty(shape, dtype=torch.bfloat16, device='meta', memory_format=memory_format)
    grid = kernels._grid(z, split)
    length = grid.turns * grid.block_s
    assert (grid.parts - 1) * length < shape[2] * shape[3] <= grid.parts * length
    assert grid.programs == shape[0] * grid.parts * -(-shape[1] // grid.block_c)
    assert grid.block_c * grid.block_s * z.element_size() <= kernels.TILE
    if split:
        assert grid.parts <= kernels.MAX_PARTS
    else:
        assert grid.turns == 1


@needs_triton
def test_unfit_arguments():
    z, row = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3)
    with pytest.raises(ValueError, match='contiguous or channels_last'):
        kernels.statistics(z[:, :, ::2])
    with pytest.raises(ValueError, match='one shape'):
        kernels.apply(z, row, row, row, z[:, :, :1])
    with pytest.raises(ValueError, match='per image and channel'):
        kernels.combine(z, z, row[:1], row, row, row)


def test_not_available_on_cpu():
    assert not kernels.available(torch.zeros(2, 3, 4, 5))


@pytest.mark.long
def test_without_triton():
    """timm_rla does not import the kernels; where Triton is missing they import, and serve nothing."""
    process = run('''
import sys
import timm_rla, torch
assert 'timm_rla.ops.gated_norm.triton' not in sys.modules
sys.modules['triton'] = None
from timm_rla.ops.gated_norm import triton as kernels
assert kernels.triton is None
assert not kernels.available(torch.zeros(2, 3, 4, 5))
''')
    assert process.returncode == 0, process.stderr
