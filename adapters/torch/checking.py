"""A user's PyTorch network, as the check of ``adapters/backend/checking.py`` sees it.

Convention: parameters go by the names that the network's own ``named_parameters`` give them.
"""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from adapters.backend.checking import STEPS, agreement
from adapters.backend.own_loop import Finding
from adapters.torch.batches import not_a_few, samples_of
from adapters.torch.derivatives import Derivatives
from adapters.torch.layers import buffers_kept, gradients_of, modes_kept, outputs_at
from adapters.torch.tapping import Names, collect_taps, owners_of
from became_core import BecameError
from became_core.arrays import Params
from became_core.curvature import Taps

__all__ = ["RowsKept", "TorchView", "agreement_of"]


class RowsKept(TorchFunctionMode):
    """Refuses a forward pass, in this context, that shortens rows of a trained weight, before it does so.

    An embedding with ``max_norm`` overwrites the rows that it looks up, which leaves no trace in autograd's graph, and
    none at all in a pass whose rows are short. Of a frozen weight nothing is lost: the rows that a pass shortens are
    those that the next one would have shortened, so that the network computes the same.
    """

    def __init__(self, trained: Mapping[str, Tensor]) -> None:
        """Keep the trained parameters, by name."""
        super().__init__()
        self._trained = trained

    def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function.

        Raises:
            BecameError: if it shortens rows of a trained parameter.
        """
        kwargs = kwargs or {}
        # PyTorch gives the weight as the second argument, and the bound by name, however the user wrote it.
        max_norm = kwargs["max_norm"] if function in (functional.embedding, functional.embedding_bag) else None
        if max_norm is not None:
            where = args[1].untyped_storage().data_ptr()
            for name, value in self._trained.items():
                if value.untyped_storage().data_ptr() == where:
                    raise BecameError(
                        f"a lookup in '{name}' shortens its rows whenever the model runs (max_norm={max_norm:g}), "
                        "beside the steps of any optimizer; leave max_norm out, and shorten rows in a post-hook of "
                        "the step."
                    )
        return function(*args, **kwargs)


class TorchView:
    """A network in evaluation mode on a few samples; its attributes are those of a ``NetworkView``."""

    steps = STEPS

    def __init__(
        self,
        network: nn.Module,
        names: Names,
        arguments: tuple[Any, ...],
        derivatives: Derivatives,
        *,
        mixes_samples: bool = False,
        compared: Sequence[Finding] = (),
    ) -> None:
        """Keep them.

        Args:
            network: in evaluation mode; it returns [samples, ...].
            names: all its modules by canonical name.
            arguments: of the network, the first being a few samples.
            derivatives: what differentiates along directions.
            mixes_samples: as of a view.
            compared: what was compared with the network as the user runs it.
        """
        self._network, self._arguments, self._derivatives = network, arguments, derivatives
        self._names, self._samples = names, 0
        owners = owners_of(names)
        self._trained = {owners[value]: value for value in network.parameters() if value.requires_grad}
        # Padding's row has no gradient by convention, and a derivative forwards.
        embeddings: list[Any] = [m for m in names if isinstance(m, nn.Embedding) and m.padding_idx is not None]
        self.padding: Mapping[str, int] = {owners[m.weight]: m.padding_idx for m in embeddings if m.weight in owners}
        self._raw = {owners[value]: raw for raw, value in network.named_parameters() if value.requires_grad}
        # Copies: memory that NumPy has seen cannot be freed again, and FSDP2 frees that of its parameters.
        self.theta: Params = {name: value.detach().clone() for name, value in self._trained.items()}
        self.rounding = self._rounding()
        self.mixes_samples, self.agreement = mixes_samples, compared

    @property
    def way(self) -> str:
        """How derivatives along directions were computed last."""
        return self._derivatives.way

    @torch.no_grad()
    def _rounding(self) -> float:
        """Return the epsilon of the coarsest dtype among the parameters and what modules return."""
        dtypes = {value.dtype for value in self._network.parameters()}

        def look(*passed: Any) -> None:
            dtypes.update([passed[-1].dtype] if isinstance(passed[-1], Tensor) else [])

        with ExitStack() as stack:
            for module in self._network.modules():
                if not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                    stack.callback(module.register_forward_hook(look).remove)
            self._network(*self._arguments)
        return max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)

    def _call(self, theta: Mapping[str, Tensor], samples: slice) -> Tensor:
        arguments = self._arguments if samples == slice(None) else samples_of(self._arguments, samples, self._samples)
        named = {self._raw[name]: value for name, value in theta.items()}
        try:
            return outputs_at(self._network, named, arguments)
        except Exception as error:
            if arguments is self._arguments or isinstance(error, BecameError):
                raise
            raise not_a_few(self._samples, error) from None

    @torch.no_grad()
    def outputs(self, theta: Params, samples: slice) -> Tensor:
        """Return the outputs of some of the samples, of all of them first."""
        # A module that something has replaced the forward of runs as it is.
        outputs = self._call({} if theta is self.theta else theta, samples)
        self._samples = self._samples or len(outputs)
        return outputs

    def seed(self, outputs: Tensor) -> Tensor:
        """Return random gradients by the outputs."""
        generator = torch.Generator("cpu").manual_seed(0)
        return torch.randn(outputs.shape, generator=generator, device="cpu").to(outputs)

    def taps(self, seed: NDArray[Any]) -> Taps:
        """Return the taps of the backward pass that begins with these gradients."""

        def cotangents(outputs: Tensor) -> list[Tensor]:
            return [torch.from_numpy(seed).to(outputs)]

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "taps do not know", UserWarning)  # said once they are needed
            (taps,) = collect_taps(self._network, self._names, self._arguments, cotangents)
        return taps

    def gradients(self, samples: slice, seed: NDArray[Any]) -> dict[str, Tensor | None]:
        """Return autograd's gradients of some of the samples alone."""
        with torch.enable_grad():
            outputs = self._call({}, samples)
        at_outputs = torch.from_numpy(seed).to(outputs)
        gradients = gradients_of(outputs, list(self._trained.values()), at_outputs)
        return dict(zip(self._trained, gradients, strict=True))

    def along(self, direction: Params, shorter: float) -> Tensor:
        """Return the derivative of the outputs along a direction; if by a difference, with a shorter step."""
        way = self._derivatives if shorter == 1 else Derivatives("difference", shorter)
        return way.along(lambda theta: self._call(theta, slice(None)), self.theta, [direction])[1][0]


def agreement_of(
    module: nn.Module, images: Tensor, in_evaluation: Sequence[nn.Module], ours: Mapping[bool, Any]
) -> list[Finding]:
    """Return how far our passes are from a module's own, in evaluation and in training.

    Args:
        module: the user's; all of it is as it was afterwards.
        images: a few samples.
        in_evaluation: those of its layers that stay in evaluation mode, in training too.
        ours: by whether the network trains, the context in which the learner runs it.
    """
    findings = []
    devices = [images.device] if images.is_cuda else []
    for training, working in ours.items():
        passes = []
        for context in (working, modes_kept(module)):
            with torch.no_grad(), torch.random.fork_rng(devices=devices), buffers_kept(module), context:
                if context is not working:
                    module.train(training)
                    for layer in in_evaluation:
                        layer.eval()
                torch.manual_seed(0)
                passes.append(module(images))
        findings.append(agreement(passes[0], passes[1], "training" if training else "evaluation"))
    return findings
