"""Download the weights that torchvision offers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mgtrain.errors import MissingCapabilityError, UsageError
from mgtrain.models import TORCHVISION


def download(source: str) -> tuple[Path, tuple[str, ...]]:
    """The weights of the network that `torchvision:NAME` names, kept in torch's cache, and their classes.

    2-D networks have those of ImageNet, whose classes are nothing to a video, the others those of Kinetics-400.
    """
    from torchvision.models import ResNet50_Weights, ResNet101_Weights, get_model_weights

    known: dict[str, Any] = {
        "torchvision:resnet50": ResNet50_Weights.IMAGENET1K_V1,
        "torchvision:resnet101": ResNet101_Weights.IMAGENET1K_V1,
        **{f"torchvision:{name}": get_model_weights(name)["DEFAULT"] for name in TORCHVISION},
    }
    if source not in known:
        raise UsageError(f"--from {source}: allowed are {', '.join(known)}; give other weights as a file")
    url: str = known[source].url
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), hash_prefix=file.stem.rpartition("-")[2])
        except (OSError, RuntimeError) as error:
            raise MissingCapabilityError(f"{url}: cannot be downloaded: {error}; give the file itself") from None
    video = source.partition(":")[2] in TORCHVISION
    return file, tuple(known[source].meta["categories"]) if video else ()
