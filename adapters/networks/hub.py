"""Networks of Hugging Face's hub, or of a folder in its layout, by names that begin with ``hf:``.

Only PyTorch builds them (``adapters/torch/hub.py``). Nothing here imports a framework.
"""

from dataclasses import dataclass
from typing import Self

from became_core import BecameError

__all__ = ["PREFIX", "HubNetwork"]

PREFIX = "hf:"


@dataclass(frozen=True)
class HubNetwork:
    """A network by its configuration file.

    Attributes:
        source: a folder with ``config.json``, or a name on the hub.
        pretrained: whether its weights are read as well; otherwise the run's seed draws them.
    """

    source: str
    pretrained: bool = False

    @classmethod
    def named(cls, name: str, *, pretrained: bool = False) -> Self | None:
        """Return the network of a name, or None if the name is none of the hub's.

        >>> HubNetwork.named("hf:google/vit-base-patch16-224-in21k").source
        'google/vit-base-patch16-224-in21k'

        Raises:
            BecameError: if nothing follows ``hf:``.
        """
        if not name.startswith(PREFIX):
            return None
        source = name.removeprefix(PREFIX)
        if not source:
            raise BecameError(f"'{PREFIX}' is followed by no name; give a folder, or a name on the hub.")
        return cls(source, pretrained)
