"""Whose units each layer of a network sees: what gating units, and freezing what lies between them, asks of it."""

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["UnitGraph"]


@dataclass(frozen=True)
class UnitGraph:
    """Layers, by the names of their weights, and whose units they see.

    Units that reach one reader from several layers are added up, unit by unit, as residual connections do.

    Attributes:
        layers: the shared ones, in the order of the network.
        sources: of each of them, and of the heads at last, the layers whose units it sees; none where it sees the
            network's inputs.
        heads: of each task.
    """

    layers: tuple[str, ...]
    sources: tuple[tuple[str, ...], ...]
    heads: tuple[str, ...]

    def readers(self, task: int) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield the layers that see others' units, in order, a task's head the last of them; and whose they see."""
        for name, sources in zip([*self.layers, self.heads[task]], self.sources, strict=True):
            if sources:
                yield name, sources

    def readers_of(self, layer: str, task: int) -> list[str]:
        """Return the layers that see a layer's units, a task's head among them."""
        return [name for name, sources in self.readers(task) if layer in sources]
