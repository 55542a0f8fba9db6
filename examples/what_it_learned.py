"""See what a network learned: train a small one on handwritten digits, then look inside it.

Run it from top to bottom, or cell by cell in an editor that knows `# %%`. It needs the extras of
`pip install 'timm_rla[quickstart,analysis]'` and half a minute on a CPU; all it writes lies in output/what_it_learned.
"""
# %% Real images: scikit-learn's 1,797 handwritten digits
from pathlib import Path

import timm
import torch
from timm.data import create_dataset, create_loader

from timm_rla.analysis import Moments, grad_cam, normalize_attention, record_attention, stack_attention
from timm_rla.analysis.attention_plot import plot_attention, plot_classes
from timm_rla.analysis.curves import plot_curves
from timm_rla.analysis.gradcam_plot import Explanation, NetworkMaps, plot_gradcam
from timm_rla.commands.quickstart import write_digits
from timm_rla.common.checkpoint import load_weights, read_checkpoint
from timm_rla.common.options import parse
from timm_rla.train.options import train_parser
from timm_rla.train.run import train

output = Path('output/what_it_learned')
digits = write_digits(output / 'digits')

# %% Train: three blocks, a few epochs
run = train(parse(train_parser(), [
    '--data-dir', str(digits), '--output', str(output), '--device', 'cpu', '--workers', '0',
    '--model', 'rla_resnet20_cifar', '--model-kwargs', 'layers=(1,1,1)', '--img-size', '16',
    '--mean', '0.5', '0.5', '0.5', '--std', '0.5', '0.5', '0.5',
    '--batch-size', '32', '--epochs', '3', '--warmup-epochs', '1', '--lr', '0.05', '--smoothing', '0',
    '--train-crop-mode', 'pad', '--hflip', '0', '--color-jitter', '0',
]))
print(plot_curves([run], run / 'curves.png'))

# %% Take the trained network, and the images that it has not seen
model = timm.create_model('rla_resnet20_cifar', layers=(1, 1, 1)).eval()
load_weights(model, read_checkpoint(str(run / 'last.pth.tar'), 'checkpoint'), 'checkpoint')
loader = create_loader(
    create_dataset('', str(digits), split='validation'),
    input_size=(3, 16, 16),
    batch_size=64,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    crop_pct=1.0,
    num_workers=0,
    persistent_workers=False,
    use_prefetcher=False,
)

# %% Layer attention over all of them, batch by batch
parts = []
with torch.inference_mode(), record_attention(model) as attention:
    for images, labels in loader:
        model(images)
        parts.append(Moments.of(stack_attention(attention), labels, num_groups=10))  # attention: [B, 1] of each block
moments = Moments.merge(parts)  # of each digit

blocks = list(attention)
names = [str(digit) for digit in range(10)]
for block, mean, std in zip(blocks, moments.over_groups().mean[0], moments.over_groups().std[0]):
    print(f'{block}  {mean:.3f} ± {std:.3f}')
print(plot_attention(moments, blocks, run / 'attention.png'))
print(plot_classes(moments, blocks, names, run / 'attention-classes.png'))

# %% Grad-CAM of every block, for the first image of the last batch and the class that the network predicts
with record_attention(model) as attention:
    cam = grad_cam(model, images[:1])
curve = normalize_attention(stack_attention(attention))[0]  # over the blocks: mean 0, standard deviation 1
predicted = int(cam.target)
probability = cam.logits.softmax(1)[0, predicted]
picture = NetworkMaps(
    'rla_resnet20_cifar with three blocks',
    image=images[0] * 0.5 + 0.5,
    maps={layer: maps[0] for layer, maps in cam.maps.items()},
    attention=dict(zip(blocks, curve.tolist())),
)
print(plot_gradcam([Explanation(f'{names[predicted]}, {probability:.1%} (predicted)', [picture])], run / 'gradcam.png'))
