"""What every projector is: a frozen memory of the old tasks that keeps updates out of the space they use.

Convention: a weight of any shape is the matrix [d_out, d_in] of its flattened trailing axes, and directions live in
its input space; names are those of the weights (``conv1.weight``).
"""

from typing import Protocol, Self

from became_core.arrays import Array, Params

__all__ = ["Projector"]


class Projector(Protocol):
    """A frozen value; ``remember`` returns a new one."""

    def project(self, updates: Params) -> Params:
        """Return the updates without their part in the protected space; a weight it knows nothing of is unchanged."""

    def project_rows(self, name: str, rows: Array) -> Array:
        """Return rows of a layer's inputs, [n, d_in], without their part in that weight's protected space.

        The weight gradient of a linear layer is g^T a, so projecting the batch's a instead of the product gives the
        same update at a fraction of the work.
        """

    def remember(self, grams: Params) -> Self:
        """Return the memory with one more task.

        Args:
            grams: for each protected weight, the sum over the task's samples and positions of a a^T, [d_in, d_in].
        """

    @property
    def ranks(self) -> dict[str, tuple[int, int]]:
        """For each protected weight, the dimension of its protected space and that of its input space."""
