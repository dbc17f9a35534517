"""What a measurement was made on."""

import platform

import torch


def device_name(model) -> str:
    """Of the device that a MODEL runs on, for reports."""
    device = model.load_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return f"{device.type}: {name}, {torch.get_num_threads()} threads" if device.type == "cpu" else name


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as rows:
            names = [row.split(":", 1)[1].strip() for row in rows if row.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()
