"""Writes docs/first-day.md: a stranger's first commands on a folder of photos, each with its output.

    python docs/first_day.py PHOTOS

PHOTOS holds train/CLASS and valid/CLASS. The commands run in a folder of their own, by the `timm-rla` of this Python's
environment.
"""
import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import List

NOISE = re.compile(r'W\d{4} |.*\d%\||$')  # of other libraries: torch's log, progress bars
PAGE = Path(__file__).with_name('first-day.md')
RUN = 'output/train/photos'
TEXT = '''# The first day

A folder of {count} photos in {classes} classes, and every command with what it prints. This page was made by
`python docs/first_day.py PHOTOS`, on a computer without a GPU. {note}

## What is there

One folder for each class, in one folder for each split; the validation images are those that training does not see.
'''
STEPS = [
    ('', ['find photos -type d | sort', 'find photos -type f | sed "s/.*[.]//" | sort | uniq -c']),
    ('''## Train

With a connection, and photos of a usual size, `--config finetune_folder` starts from ImageNet weights. This network for
images of 32 pixels starts from nothing, in less than a minute.
''', ['timm-rla train --data-dir photos --model rla_resnet20_cifar --train-crop-mode pad --batch-size 15 --epochs 20 '
      '--lr 0.05 --warmup-epochs 2 --log-interval 100 --experiment photos']),
    ('''## Ask it

The checkpoint knows the model, its input and the names of the classes.
''', [f'timm-rla predict photos/valid --checkpoint {RUN}/model_best.pth.tar --topk 3',
      f'timm-rla validate --checkpoint {RUN}/model_best.pth.tar --data-dir photos --confusion confusion.png']),
    ('## Look into it\n', [
        f'timm-rla attention --checkpoint {RUN}/model_best.pth.tar --data-dir photos',
        f'timm-rla gradcam photos/valid/*/* --checkpoint {RUN}/model_best.pth.tar --sheet --output gradcam.png',
        f'timm-rla curves {RUN}',
    ]),
    ('''## Take it elsewhere

The exported folder is what `timm-rla push` publishes. timm and transformers load it, from the Hub or from a disk.
''', [f'timm-rla export {RUN}/model_best.pth.tar photos-model',
      'timm-rla predict photos/valid --model local-dir:photos-model --topk 1',
      'python -c "import timm; print(timm.create_model(\'local-dir:photos-model\', pretrained=True).num_classes)"',
      'python -c "from transformers import AutoModelForImageClassification as M; '
      'print(M.from_pretrained(\'photos-model\').config.id2label)"']),
]


def show(command: str, folder: Path) -> List[str]:
    """A command and its output, as on a terminal."""
    result = subprocess.run(
        ['bash', '-c', command], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=dict(os.environ, PATH=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}', COLUMNS='100'))
    if result.returncode:
        sys.exit(f'{command}\n{result.stdout}')
    output = re.sub(r'^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ', '', result.stdout, flags=re.MULTILINE)
    lines = [line for line in output.rstrip().replace(str(folder), '.').splitlines() if not NOISE.match(line)]
    return [f'$ {command if command.startswith("python") else _wrap(command)}', *lines]


def _wrap(command: str) -> str:
    """A long command, broken before options."""
    lines = ['']
    for word in re.split(r' (?=--)', command):
        if len(lines[-1]) + len(word) > 100:
            lines.append('')
        lines[-1] += f' {word}' if lines[-1] else word
    return ' \\\n    '.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('photos', type=Path, metavar='PHOTOS')
    parser.add_argument('--note', default='', metavar='TEXT', help='what the page says of the photos')
    args = parser.parse_args()
    count = sum(1 for path in args.photos.rglob('*') if path.is_file())
    classes = len(list((args.photos / 'train').iterdir()))
    parts = [TEXT.format(count=count, classes=classes, note=args.note)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copytree(args.photos, folder / 'photos')
        for text, commands in STEPS:
            parts.append(text)
            for command in commands:
                print(shlex.join(command.split()[:2]), flush=True)
                parts += ['```', *show(command, folder), '```', '']
    PAGE.write_text('\n'.join(parts).replace('\n\n\n', '\n\n').rstrip() + '\n')


if __name__ == '__main__':
    main()
