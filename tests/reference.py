"""The network as a plain loop over its residual blocks, written from equations 1 to 6 of the paper.

It takes the parameters by the names of the package and shares no code with it. Batch norm, the LSTM and the resampling
are written out; nothing is kept between calls.
"""
import torch
import torch.nn.functional as F

BN_EPS = 1e-5


def resample(x, n):
    """Adaptive average pooling by its definition: entry i is the mean of [floor(i C / n), ceil((i + 1) C / n))."""
    channels = x.shape[1]
    windows = [(i * channels // n, ((i + 1) * channels + n - 1) // n) for i in range(n)]
    return torch.stack([x[:, start:stop].sum(1) / (stop - start) for start, stop in windows], 1)


def lstm(s, h, c, weight_ih, weight_hh, bias_ih, bias_hh):
    """Equation 3 with gates in the order i, f, g, o."""
    m = h.shape[1]
    gates = s @ weight_ih.T + bias_ih + h @ weight_hh.T + bias_hh
    input_gate = torch.sigmoid(gates[:, :m])
    forget_gate = torch.sigmoid(gates[:, m:2 * m])
    candidate = torch.tanh(gates[:, 2 * m:3 * m])
    output_gate = torch.sigmoid(gates[:, 3 * m:])
    c = forget_gate * c + input_gate * candidate
    return output_gate * torch.tanh(c), c


def batch_norm(x, params, name, training):
    if training:
        mean = x.mean((0, 2, 3))
        var = ((x - mean[:, None, None]) ** 2).mean((0, 2, 3))  # biased, as batch norm normalises in training
    else:
        mean, var = params[f'{name}.running_mean'], params[f'{name}.running_var']
    x = (x - mean[:, None, None]) / torch.sqrt(var + BN_EPS)[:, None, None]
    return x * params[f'{name}.weight'][:, None, None] + params[f'{name}.bias'][:, None, None]


def linear(x, params, name):
    weight = params[f'{name}.weight']
    return F.linear(x, weight.flatten(1), params[f'{name}.bias'])  # SE keeps its two layers as 1 x 1 convolutions


def mlp(x, params, name):
    return linear(F.relu(linear(x, params, f'{name}.fc1')), params, f'{name}.fc2')


def residual_branch(x, params, name, stride, bottleneck, training):
    """Equation 1: A_l, the output of the last batch norm."""
    if bottleneck:  # the 3 x 3 convolution has the stride
        convs = [('1', 1, 0), ('2', stride, 1), ('3', 1, 0)]
    else:
        convs = [('1', stride, 1), ('2', 1, 1)]
    for i, conv_stride, padding in convs:
        if i != '1':
            x = F.relu(x)
        x = F.conv2d(x, params[f'{name}.conv{i}.weight'], stride=conv_stride, padding=padding)
        x = batch_norm(x, params, f'{name}.bn{i}', training)
    return x


def projection_shortcut(x, params, name, stride, training):
    if f'{name}.downsample.0.weight' not in params:
        return x
    x = F.conv2d(x, params[f'{name}.downsample.0.weight'], stride=stride)
    return batch_norm(x, params, f'{name}.downsample.1', training)


def padded_shortcut(x, channels, stride):
    """Option A of He et al.: subsample, and zeros for the channels that are missing at the end."""
    x = x[:, :, ::stride, ::stride]
    return torch.cat([x, x.new_zeros(x.shape[0], channels - x.shape[1], *x.shape[2:])], 1)


def summary(a, params, name, context, n):
    """Equation 2: S_l."""
    pooled = {'gap': a.flatten(2).mean(2), 'gmp': a.flatten(2).max(2).values}[context[:3]]
    if context.endswith('_mlp'):
        pooled = mlp(pooled, params, f'{name}.context.mlp')
    return resample(pooled, n)


def logits(params, x, layers, bottleneck=False, cifar=False, context='gap', se=False, vector=False, training=False):
    """Logits of a network with `layers` blocks in each stage; `params` is its state dict."""
    n, m = params['lstm.weight_ih'].shape[1], params['lstm.weight_hh'].shape[1]

    x = F.conv2d(x, params['conv1.weight'], stride=1 if cifar else 2, padding=1 if cifar else 3)
    x = F.relu(batch_norm(x, params, 'bn1', training))
    if not cifar:
        x = F.max_pool2d(x, 3, stride=2, padding=1)

    h = c = x.new_zeros(x.shape[0], m)
    for stage, blocks in enumerate(layers):
        for block in range(blocks):
            name = f'layer{stage + 1}.{block}'
            stride = 2 if stage > 0 and block == 0 else 1
            a = residual_branch(x, params, name, stride, bottleneck, training)
            s = summary(a, params, name, context, n)
            h, c = lstm(s, h, c, *(params[f'lstm.{p}'] for p in ('weight_ih', 'weight_hh', 'bias_ih', 'bias_hh')))
            alpha = torch.sigmoid(mlp(h, params, f'{name}.attention'))  # eq. 4
            assert alpha.shape[1] == (a.shape[1] if vector else 1)
            if se:
                a = a * torch.sigmoid(mlp(a.mean((2, 3)), params, f'{name}.se'))[:, :, None, None]  # eq. 6, inner
            a = alpha[:, :, None, None] * a  # eq. 5, and eq. 6, outer
            if cifar:
                shortcut = padded_shortcut(x, a.shape[1], stride)
            else:
                shortcut = projection_shortcut(x, params, name, stride, training)
            x = F.relu(shortcut + a)
    return linear(x.mean((2, 3)), params, 'fc')
