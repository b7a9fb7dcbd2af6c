"""Which parameters a network uses as whole matrices alone, found batch by batch: a projector can protect these.

What a batch does not use, such as the head of another task or an expert that none of its samples is sent to, is found
in the first batch that uses it, before its inputs are summed. Several processes each look at their own batches, and
agree when all have been read.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from adapters.backend.memory import matrices_with
from adapters.torch.batches import few_samples
from adapters.torch.tapping import Layouts, ways_of
from became_core.curvature import Taps

__all__ = ["Matrices", "Verdict"]

Verdict = bool | Literal["otherwise", "untold"]
"""Whether a matrix is stored as [d_in, d_out]; that it is used otherwise too; or that a batch could not tell."""


class Matrices:
    """The matrices that a projector can protect, of old data and of those batches that were looked at.

    Attributes:
        ways: whether each is stored as [d_in, d_out].
        is_begun: whether a batch was looked at.
    """

    def __init__(self, known: Mapping[str, bool], held: Collection[str], layouts: Layouts) -> None:
        """Begin with those of old data.

        Args:
            known: of old data, and whether they are stored as [d_in, d_out].
            held: the parameters that old data hold otherwise than by the spaces of a projector, which they go on to do.
            layouts: what other batches of the same network told.
        """
        self.ways, self.is_begun = dict(known), False
        self._known, self._held, self._layouts = known, held, layouts
        self._found: dict[str, bool | None] = {}
        # Those whose inputs were summed from the first batch on that used them, or were not.
        self._judged: set[str] = set()

    def look(self, network: nn.Module, names: Mapping[nn.Module, str], arguments: tuple[Any, ...]) -> None:
        """Find the matrices that a few samples use.

        Args:
            network: what runs, in evaluation mode.
            names: all its modules by canonical name.
            arguments: of the network, the first being at least two samples.

        Raises:
            BecameError: if a matrix of old data is used otherwise now.
        """
        self._add(ways_of(network, names, arguments, self._layouts))

    def look_at_new(
        self, network: nn.Module, names: Mapping[nn.Module, str], inputs_of: Callable[[], Any], taps: Taps
    ) -> None:
        """Find the matrices that a batch uses and none before it; all of their inputs are still to be summed.

        Args:
            network: as for ``look``.
            names: likewise.
            inputs_of: returns the inputs of the batch, if they are needed.
            taps: of the batch.

        Raises:
            BecameError: as ``look`` does.
        """
        used = {tap.weight_name(layer): tap for layer, tap in taps.items()}
        new = used.keys() - self._judged
        if not new:
            return
        inputs, samples = inputs_of(), len(next(iter(used.values())).inputs)
        arguments = (inputs,) if samples > 1 else few_samples((inputs,), samples)
        found = ways_of(network, names, arguments, self._layouts)
        self._add({name: way for name, way in found.items() if name in new})
        self._judged |= new

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """What this process knows of every matrix that its batches use."""
        found: dict[str, Verdict] = {n: "otherwise" if way is None else way for n, way in self._found.items()}
        return {name: found.get(name, "untold") for name in self._judged}

    def agree(self, verdicts: Sequence[Mapping[str, Verdict]]) -> None:
        """Keep the matrices that all processes have found which use them; they are the same in all processes then.

        Args:
            verdicts: those of each process.

        Raises:
            BecameError: as ``look`` does, in all processes.
        """
        self._found = {}
        for name in dict.fromkeys(name for of_one in verdicts for name in of_one):
            ways = {of_one[name] for of_one in verdicts if name in of_one}
            if "untold" not in ways:
                way = ways.pop()
                self._found[name] = None if ways or way == "otherwise" else bool(way)
        self.ways = matrices_with(self._known, self._found, self._held)

    def _add(self, found: Mapping[str, bool | None]) -> None:
        self.is_begun = True
        self._found |= found
        self._judged |= found.keys()
        self.ways = matrices_with(self._known, self._found, self._held)
