"""`timm-rla detect predict IMAGE...`: draw what a trained detector finds in images."""
import json
from pathlib import Path
from typing import Any, Dict, List

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torchvision.transforms.v2.functional import to_pil_image

from ...common.errors import UserError, blame
from ...common.files import check_outputs, check_writable, replacing
from ...common.images import find_images
from ...common.options import OptionParser
from ...common.progress import Progress
from ..checkpoint import TrainedDetector, load_detector
from ..data import read_pixels
from ..evaluation import coco_results
from ..options import add_checkpoint_options

__all__ = ['main']

COLORS = ('#e6194b', '#3cb44b', '#4363d8', '#f58231', '#911eb4', '#46f0f0', '#f032e6', '#bcf60c', '#fabebe', '#008080')


def predict_parser() -> OptionParser:
    parser = OptionParser(prog='timm-rla detect predict', description='Draw what a trained detector finds in images.')
    add = parser.add_argument
    add('images', nargs='+', metavar='IMAGE', help='image, or a folder with images in it or in its folders')
    add_checkpoint_options(add)
    add('--output', default='output/detections', metavar='DIR', help='folder of the drawn images')
    add('--score-thresh', type=float, default=0.5, metavar='S', help='detections below this score are not drawn')
    add('--json', metavar='FILE', help="write all detections as COCO's result files have them, with the file names; "
                                       'image ids count the files from 1')
    add('--log-freq', type=int, default=10, metavar='N', help='images between log lines')
    return parser


def main(argv: List[str]) -> None:
    """Command line."""
    args = predict_parser().parse_args(argv)
    paths, problems = find_images(args.images, recursive=True)
    if not paths:
        raise UserError('; '.join(problems))
    output = Path(args.output)
    check_outputs([('--json', Path(args.json))] if args.json else [], [args.checkpoint, *paths])
    check_writable(output / 'image.png', '--output')
    detector = load_detector(args.checkpoint, device=args.device)
    results: List[Dict[str, Any]] = []
    done = 0  # images
    with torch.inference_mode(), Progress('Predict', len(paths), args.log_freq) as progress:
        for number, path in enumerate(paths, start=1):
            try:
                pixels = read_pixels(path)
                with blame(str(path), RuntimeError, ValueError):  # such as one that is too thin for the network
                    found = {key: value.cpu() for key, value in detector.model([pixels.to(args.device)])[0].items()}
                done += 1
                results += [dict(entry, file_name=str(path))
                            for entry in coco_results([found], [number], detector.category_ids)]
                with blame(f'{path}: not drawn', OSError, ValueError):
                    drawn = draw(pixels, found, detector, args.score_thresh)
                    with replacing(output / f'{number:04}-{path.stem}.png') as temporary:
                        drawn.save(temporary, format='PNG')
            except UserError as e:
                problems.append(str(e))  # said at the end, when all other images are done
            progress.update(1)
    if args.json:
        with blame(f'--json {args.json}', OSError), replacing(Path(args.json)) as temporary:
            temporary.write_text(json.dumps(results))
    print(f'{len(results)} detections in {done} images; those from {args.score_thresh:g} on drawn in {output}')
    if problems:
        raise UserError('; '.join(problems))


def draw(
        pixels: torch.Tensor,
        found: Dict[str, torch.Tensor],
        detector: TrainedDetector,
        threshold: float,
) -> Image.Image:
    """An image with boxes, names and scores, in a size that goes with that of the image.

    Args:
        pixels: [3, H, W] in [0, 1].
        found: As a detector of torchvision returns it.
        detector: What found it.
        threshold: Least score that is drawn.
    """
    image = to_pil_image((pixels * 255).round().to(torch.uint8))
    canvas = ImageDraw.Draw(image)
    size = max(10, min(image.size) // 50)
    font = ImageFont.load_default(size)
    keep = found['scores'] >= threshold
    for box, label, score in zip(*(found[key][keep].tolist() for key in ('boxes', 'labels', 'scores'))):
        color = COLORS[label % len(COLORS)]
        canvas.rectangle(box, outline=color, width=size // 5)
        text = dict(xy=box[:2], text=f' {detector.names[label - 1]} {score:.2f} ', font=font)
        canvas.rectangle(canvas.textbbox(**text), fill=color)
        canvas.text(fill='black' if ImageColor.getcolor(color, 'L') > 127 else 'white', **text)
    return image
