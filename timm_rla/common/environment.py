"""On what a figure was measured: date, machine and versions, as columns of the tables under results/."""
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Dict

import torch

__all__ = ['describe_environment']


def _processor() -> str:
    cpuinfo = Path('/proc/cpuinfo')  # Linux; platform.processor() is empty there
    for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []:
        if line.startswith('model name'):
            return line.split(':', 1)[1].strip()
    return platform.processor() or platform.machine()


def describe_environment(device: str = 'cpu') -> Dict[str, str]:
    """Date, hardware and versions of a measurement on a device, 'cpu', 'cuda' or 'cuda:N'."""
    hardware = torch.cuda.get_device_name(device) if device.startswith('cuda') else \
        f'{_processor()}, {torch.get_num_threads()} threads'
    return dict(
        date=date.today().isoformat(),
        hardware=hardware,
        python=platform.python_version(),
        torch=torch.__version__,
        timm=version('timm'),
        timm_rla=version('timm_rla'),
    )
