"""Options of a detector that trains in seconds, and what is read from its checkpoints."""
import torch

COLORS = {3: 'red', 8: 'blue'}
TRAIN = ['detect', 'train', '--backbone', 'rla_resnet18', '--backbone-kwargs', 'layers=(1,1,1,1)',
         'channels=(16,32,64,128)', '--no-frozen-bn', '--min-size', '64', '--max-size', '96',
         '--pyramid-channels', '16', '--anchor-sizes', '8', '16', '24', '32', '48',
         '--rpn-post-nms-top-n-train', '40', '--rpn-post-nms-top-n-test', '40', '--box-batch-size-per-image', '16',
         '--iterations', '6', '--eval-interval', '4', '--checkpoint-interval', '2', '--lr', '0.01', '--workers', '0',
         '--device', 'cpu', '--seed', '1']


def weights(folder):
    return torch.load(folder / 'checkpoint-6.ckpt', weights_only=True)['state_dict']


def iteration(checkpoint):
    return torch.load(checkpoint, weights_only=True)['global_step']
