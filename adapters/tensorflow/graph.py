"""The uses that a Keras model makes of its parameters, read off the graph of a forward pass.

A layer's ``call`` is neither replaced nor known by its class: ``tf.function`` traces the model as it is, and the graph
says which operations have met a parameter, or something that was made of it alone.

| operation | the parameter is used as |
| --- | --- |
| MatMul, BatchMatMulV2, Einsum | a matrix |
| Conv2D, DepthwiseConv2dNative | a matrix of patches |
| GatherV2 | an embedding |
| AddV2, BiasAdd, Sub, Mul, RealDiv | a factor or summand of each element, as norms' scales and all biases are |

On its way from the variable to that operation a parameter may be cast and reshaped, a matrix also transposed; what is
used for each element may also go through arithmetic with constants, as the scale of a batch norm in inference does. Any
other use is unknown, among them all inside a loop or a compiled call.

Convention: a use has rows, which are the positions of all samples, samples first.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from adapters.tensorflow.parameters import Parameter
from became_core.arrays import Array

__all__ = ["Unknown", "Use", "uses_of"]

_VIEWS = frozenset({"Identity", "Cast", "Reshape", "ExpandDims", "Squeeze"})
_ARITHMETIC = frozenset({"Mul", "AddV2", "Add", "Sub", "RealDiv", "Neg", "Square", "Sqrt", "Rsqrt", "Exp", "Softplus"})
_NO_VALUES = frozenset({"Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike", "StopGradient"})


@dataclass(frozen=True)
class Use:
    """One use of a parameter.

    Attributes:
        kind: what it is used as.
        output: of the operation, by which the gradient is asked for.
        rows: from that gradient to [rows, d_out]; of an elementwise use, to the rows' gradients by the parameter.
        inputs: the rows that meet the parameter, [rows, d_in]; indices [rows] for an embedding, and None for an
            elementwise use.
        groups: as of a tap.
        transposed: whether a matrix is, in the layout of the parameter's name, [d_in, d_out].
    """

    kind: Literal["matrix", "embedding", "elementwise"]
    output: Array
    rows: Callable[[Array], Array]
    inputs: Array | None = None
    groups: int = 1
    transposed: bool = False


@dataclass(frozen=True)
class Unknown:
    """A use that is none of the table's; ``operation`` is its type."""

    operation: str


def uses_of(
    leaves: Mapping[str, Array], parameters: Mapping[str, Parameter], inputs: Iterable[Array], outputs: Array
) -> dict[str, list[Use | Unknown]]:
    """Return the uses of parameters in the graph that is being traced.

    Args:
        leaves: the tensors that stand for the parameters, in the shapes of their variables.
        parameters: by name.
        inputs: the tensors of the samples.
        outputs: the model's.
    """
    relevant = _operations_before(outputs)
    dependent = _operations_after(inputs)
    uses: dict[str, list[Use | Unknown]] = {}
    for name, leaf in leaves.items():
        uses[name] = list(_uses(leaf, parameters[name], relevant, dependent))
    return uses


def _operations_before(outputs: Array) -> set[Any]:
    """Return all operations that the outputs are computed by."""
    before, waiting = set(), [outputs.op]
    while waiting:
        operation = waiting.pop()
        if operation not in before:
            before.add(operation)
            waiting.extend(tensor.op for tensor in operation.inputs)
    return before


def _operations_after(inputs: Iterable[Array]) -> set[Any]:
    """Return all operations whose results depend on the samples, and not on their number alone."""
    after: set[Any] = set()
    waiting = [operation for tensor in inputs for operation in tensor.consumers()]
    while waiting:
        operation = waiting.pop()
        if operation not in after and operation.type not in _NO_VALUES - {"StopGradient"}:
            after.add(operation)
            waiting.extend(consumer for tensor in operation.outputs for consumer in tensor.consumers())
    return after


def _uses(leaf: Array, parameter: Parameter, relevant: set[Any], dependent: set[Any]) -> Iterator[Use | Unknown]:
    """Follow a parameter through what is made of it alone, up to the operations at which it meets the samples."""
    # Each tensor on the way: whether it is the parameter in another shape, and whether that is transposed.
    waiting: list[tuple[Array, bool, bool]] = [(leaf, True, False)]
    seen: set[int] = set()
    while waiting:
        tensor, is_view, is_turned = waiting.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        for operation in dict.fromkeys(tensor.consumers()):
            if operation not in relevant or operation.type in _NO_VALUES:
                continue
            if operation in dependent:
                index = [operand is tensor for operand in operation.inputs].index(True)
                yield _use(operation, index, leaf, parameter, is_view=is_view, is_turned=is_turned)
                continue
            result = operation.outputs[0]
            same_size = result.shape.is_fully_defined() and prod(result.shape) == parameter.size
            if operation.type in _VIEWS and same_size:
                waiting.append((result, is_view, is_turned))
            elif operation.type in _ARITHMETIC and same_size and not is_turned:
                waiting.append((result, False, False))
            elif operation.type == "Transpose" and tensor.shape.rank == 2 and is_view:
                permutation = _constant(operation.inputs[1])
                waiting.append((result, True, is_turned ^ (list(permutation) == [1, 0])))
            else:
                yield Unknown(operation.type)


def _use(
    operation: Any, index: int, leaf: Array, parameter: Parameter, *, is_view: bool, is_turned: bool
) -> Use | Unknown:
    """Return what an operation does with a parameter, or with what was made of it, and with samples."""
    found = None
    if operation.type in ("AddV2", "Add", "BiasAdd", "Sub", "Mul", "RealDiv") and not (
        is_turned or parameter.is_turned
    ):
        found = _elementwise(operation, index, leaf, is_view)
    elif is_view and operation.type in ("MatMul", "BatchMatMulV2") and index == 1:
        found = _product(operation, parameter, is_turned)
    elif is_view and not is_turned and operation.type == "Einsum" and index == 1:
        found = _einsum(operation, parameter)
    elif is_view and not is_turned and operation.type in ("Conv2D", "DepthwiseConv2dNative") and index == 1:
        found = _convolution(operation, parameter)
    elif is_view and not is_turned and operation.type == "GatherV2" and index == 0:
        found = _lookup(operation)
    return found or Unknown(operation.type)


def _elementwise(operation: Any, index: int, leaf: Array, is_view: bool) -> Use | None:
    operand, other = operation.inputs[index], operation.inputs[1 - index]
    # The operand's own axes, without those of size 1 before them, along which it is broadcast.
    axes = list(operand.shape)
    while axes and axes[0] == 1:
        axes = axes[1:]
    rank = operation.outputs[0].shape.rank
    if rank is None or len(axes) >= rank or (operation.type == "RealDiv" and index):
        return None
    factor = other if operation.type == "Mul" else 1 / other if operation.type == "RealDiv" else None
    sign = -1 if operation.type == "Sub" and index else 1
    # What arithmetic with constants has done to the parameter, element by element.
    slope = None if is_view else tf.gradients(operand, leaf, tf.ones_like(operand))[0]

    def rows(gradient: Array) -> Array:
        parts = sign * (gradient if factor is None else gradient * factor)
        parts = tf.reshape(parts, (-1, *parts.shape[rank - len(axes) :])) if axes else tf.reshape(parts, (-1, 1))
        summed = [place + 1 for place, size in enumerate(axes) if size == 1]
        by_row = tf.reshape(tf.reduce_sum(parts, summed), (-1, prod(axes)))
        if slope is None:
            return tf.cast(by_row, leaf.dtype)
        return tf.cast(by_row, leaf.dtype) * tf.reshape(slope, (1, -1))

    return Use("elementwise", operation.outputs[0], rows)


def _product(operation: Any, parameter: Parameter, is_turned: bool) -> Use | None:
    a, matrix = operation.inputs
    batched = operation.type == "BatchMatMulV2"
    names = ("adj_x", "adj_y") if batched else ("transpose_a", "transpose_b")
    first, second = (operation.get_attr(name) for name in names)
    if matrix.shape.rank != 2 or (parameter.is_turned and tuple(matrix.shape) not in _two_ways(parameter)):
        return None
    rows = tf.linalg.matrix_transpose(a) if first else a
    stored_in_out = not (second ^ is_turned)
    return _matrix(operation.outputs[0], rows, parameter, stored_in_out)


def _two_ways(parameter: Parameter) -> set[tuple[int, ...]]:
    own = tuple(parameter.variable.shape)
    return {own, own[::-1]} if len(own) == 2 else set()


def _matrix(output: Array, inputs: Array, parameter: Parameter, stored_in_out: bool) -> Use:
    """Return the use of a matrix by which the last axis of the inputs becomes the last one of the output."""
    return Use(
        "matrix",
        output,
        _rows,
        _rows(inputs),
        transposed=stored_in_out ^ parameter.is_turned,
    )


def _rows(array: Array) -> Array:
    return tf.reshape(array, (-1, tf.shape(array)[-1] if array.shape[-1] is None else array.shape[-1]))


def _einsum(operation: Any, parameter: Parameter) -> Use | None:
    """Return the use of a matrix whose inputs' axes, or outputs' axes, are several that lie side by side."""
    equation = operation.get_attr("equation").decode()
    if "." in equation or parameter.is_turned:
        return None
    (left, matrix), result = equation.split("->")[0].split(","), equation.split("->")[1]
    summed = "".join(label for label in matrix if label in left and label not in result)
    made = "".join(label for label in matrix if label in result and label not in left)
    kept = "".join(label for label in left if label not in summed)
    if matrix not in (summed + made, made + summed) or not all((summed, made, kept)) or set(kept + made) != set(result):
        return None

    def sorted_axes(array: Array, labels: str, last: str) -> Array:
        turned = tf.transpose(array, [labels.index(label) for label in kept + last])
        width = prod(turned.shape[len(kept) :])
        return tf.reshape(turned, (-1, width))

    return Use(
        "matrix",
        operation.outputs[0],
        lambda gradient: sorted_axes(gradient, result, made),
        sorted_axes(operation.inputs[0], left, summed),
        transposed=matrix == summed + made,
    )


def _convolution(operation: Any, parameter: Parameter) -> Use | None:
    images, kernel = operation.inputs
    padding, strides, rates = (operation.get_attr(name) for name in ("padding", "strides", "dilations"))
    channels = images.shape[-1]
    if operation.get_attr("data_format") != b"NHWC" or padding == b"EXPLICIT" or channels is None:
        return None
    depthwise = operation.type == "DepthwiseConv2dNative"
    if depthwise and not parameter.is_turned:
        return None
    places = prod(kernel.shape[:2])
    patches = tf.image.extract_patches(images, (1, *kernel.shape[:2], 1), strides, rates, padding.decode())
    rows = tf.reshape(patches, (-1, places, channels))
    if parameter.is_turned:  # then a patch's channels come first, as the weight's do
        rows = tf.transpose(rows, (0, 2, 1))
    groups = channels if depthwise else channels // kernel.shape[2]
    if groups > 1 and not parameter.is_turned:
        return None
    return Use(
        "matrix",
        operation.outputs[0],
        _rows,
        tf.reshape(rows, (-1, places * channels)),
        groups=groups,
        transposed=not parameter.is_turned,
    )


def _lookup(operation: Any) -> Use | None:
    table, indices, axis = operation.inputs
    if table.shape.rank != 2 or _constant(axis) != 0 or operation.get_attr("batch_dims"):
        return None
    return Use("embedding", operation.outputs[0], _rows, tf.reshape(indices, (-1,)))


def _constant(tensor: Array) -> Any:
    value: Any = tf.get_static_value(tensor)
    return np.asarray(-1 if value is None else value)


def operations_of(uses: Sequence[Use | Unknown]) -> list[str]:
    """Return the types of the operations that are unknown."""
    return sorted({use.operation for use in uses if isinstance(use, Unknown)})
