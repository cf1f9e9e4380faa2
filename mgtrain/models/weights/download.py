"""Download the weights that torchvision offers."""

from pathlib import Path
from typing import Any

import torch

from mgtrain.errors import MissingCapabilityError, UsageError
from mgtrain.models import TORCHVISION


def download(source: str) -> tuple[Path, tuple[str, ...]]:
    """Download the weights of `torchvision:NAME` to torch's cache; return the file and the names of its classes.

    Video networks are trained on Kinetics-400. 2-D networks are trained on ImageNet, whose classes are not returned.

    Raises:
        UsageError: torchvision has no such weights here.
        MissingCapabilityError: the download fails.
    """
    from torchvision.models import ResNet50_Weights, ResNet101_Weights, get_model_weights

    known: dict[str, Any] = {
        "torchvision:resnet50": ResNet50_Weights.IMAGENET1K_V1,
        "torchvision:resnet101": ResNet101_Weights.IMAGENET1K_V1,
        **{f"torchvision:{name}": get_model_weights(name)["DEFAULT"] for name in TORCHVISION},
    }
    if source not in known:
        raise UsageError(f"--from {source}: must be one of {', '.join(known)}; give other weights as a file")
    url: str = known[source].url
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), hash_prefix=file.stem.rpartition("-")[2])
        except (OSError, RuntimeError) as error:
            raise MissingCapabilityError(
                f"{url}: cannot be downloaded: {error}; download it elsewhere and give the file with --model"
            ) from None
    video = source.partition(":")[2] in TORCHVISION
    return file, tuple(known[source].meta["categories"]) if video else ()
