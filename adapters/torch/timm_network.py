"""Networks of the package ``timm`` as backbones, without their classifiers.

Convention: as in ``hub.py``. Images are resized to the size that timm's configuration of the network names, and the
features [N, features] are those that its classifier would see. Weights are read as timm reads them: it prefers
safetensors, and of other files it asks PyTorch for weights alone.
"""

import torch
from torch import Tensor

from adapters.networks import HubNetwork
from adapters.torch.hub import HubBackbone
from became_core import BecameError
from became_core.continual import TaskStream
from became_core.errors import first_line

__all__ = ["TimmBackbone", "timm_backbone"]


class TimmBackbone(HubBackbone):
    """A model of ``timm`` as a backbone: images [N, C, H, W] to features."""

    def _features(self, images: Tensor) -> Tensor:
        features: Tensor = self.model(images)
        return features


def timm_backbone(network: HubNetwork, stream: TaskStream, seed: int) -> TimmBackbone:
    """Return a network of timm as a backbone for a stream.

    Args:
        network: which.
        stream: what it will learn.
        seed: draws the weights if they are not pretrained.

    Raises:
        BecameError: if timm is missing or cannot be imported, it has no such network or weights, or the network cannot
            learn these samples.
    """
    source, shape = network.source, stream.dataset.images.shape[1:]
    if len(shape) == 1:
        raise BecameError(f"the network '{source}' of timm reads images, not text; choose another.")
    try:
        import timm
        from timm.data import resolve_model_data_config
    except ModuleNotFoundError as error:
        raise BecameError(f"the package '{error.name}' is missing; pip install 'became[timm]'.") from None
    except (AttributeError, ImportError, OSError, RuntimeError) as error:
        raise BecameError(
            f"the package 'timm' cannot be imported: {first_line(error)}; it needs a torchvision that was built for "
            "this PyTorch."
        ) from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = timm.create_model(source, pretrained=network.pretrained, num_classes=0)
        except (AssertionError, OSError, RuntimeError, ValueError) as error:  # no such name or weights, no network
            raise BecameError(f"the network '{source}' of timm cannot be made: {first_line(error)}.") from None
    about = resolve_model_data_config(model)
    channels, *size = about["input_size"]
    known = (about["mean"], about["std"]) if network.pretrained else None
    backbone = TimmBackbone(model.eval(), stream, channels=channels, size=size, known=known)
    backbone.try_on(shape, source)
    return backbone.train()
