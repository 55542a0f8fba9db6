"""Fine-tunes a detector on a data set in the format of COCO: python finetune_detector.py FOLDER

FOLDER has annotations/train.json, annotations/val.json and images/, or another layout of docs/detection.md. The
checkpoint that Lightning leaves is one for `timm-rla detect eval`, `predict` and `export`.
"""
import sys

import lightning.pytorch as pl

from timm_rla.detection import Detection, DetectionData, Schedule, fasterrcnn, read_folder

train, val = read_folder(sys.argv[1])
model = fasterrcnn('rla_resnet50', num_classes=len(train.names) + 1, pretrained=True)
module = Detection(model, train, Schedule(iterations=3000, lr=0.005, warmup_iterations=500))
pl.Trainer(max_steps=3000, use_distributed_sampler=False).fit(module, DetectionData(train, val, batch_size=2))
print(f'mAP@[.5,.95] {module.numbers["map"]:.3f}')
