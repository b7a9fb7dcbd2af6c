"""Sums of products of millions of elements: accurate in float32, quick for small arrays, and in little memory.

Accuracy: to add n numbers one after the other loses up to n units in the last place; past 2^24 equal ones, a float32
sum no longer grows. So sums are taken in a binary tree (pairwise summation, Higham 1993), in which each number goes
through log2(n) additions. Within a slab the tree is the library's own, where it has one. Before that, a few slabs are
added one after the other, element by element, in frameworks where this takes less time.

Speed: arrays are cut into slabs that fit a processor's cache, and many small arrays are joined to one slab, because
each operation costs a microsecond or more whatever its size. Memory: intermediate results are as large as a slab, and
under a trace as large as a piece of the compiler's loop, never as large as an array.

Arrays that several processes share are summed part by part, and their few sums once over the processes. Arrays that a
compiler may spread over several devices keep their shapes, and the compiler adds the devices' sums: on an accelerator
in a tree of its own; on several processor devices a float32 sum is as accurate as XLA makes it.

Convention: a row is a tuple of arrays of one shape; a sum over a row is over the elements of these arrays side by side.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from operator import methodcaller
from typing import Any, NamedTuple

import numpy as np

from became_core.arrays.frameworks import Framework, times_itself
from became_core.arrays.namespace import Array, device, framework_for, namespace, reduction_dtype
from became_core.arrays.shards import Reduce, Shared, shared_by_processes

__all__ = ["Factors", "SumsOfProducts", "sums_of_products", "tree_sum"]

# Elements of a slab that small rows are joined to, and of the largest row that is: to join larger ones costs more time
# than it saves.
JOINED_SLAB, LARGEST_JOINED = 3 * 2**13, 2**13
# Elements of a slab on an accelerator, which needs no cache but time to start each operation.
ACCELERATOR_SLAB = 2**22
# Elements of a piece in a compiler's loop: of most pieces, and of those that cut up what is left. Powers of two.
LOOP_PIECES = 2**20, 2**16
# At most so many slabs are added element by element, in frameworks where this takes less time than to sum each slab.
# They are few, so that each number still goes through few additions.
ADDED_SLABS = 2**4
# Elements from which on an inner product without products in memory is worth its more calls.
DOT_LENGTH = 2**14

Row = Sequence[Array]
# From flat arrays side by side, and a function that squares an array and may use its memory, to the two factors of each
# product, flat and of the same length.
Factors = Callable[[Row, Callable[[Array], Array]], Sequence[tuple[Array, Array]]]


class SumsOfProducts(NamedTuple):
    """The sums, and what there is to check.

    Attributes:
        sums: one array [groups] for each product.
        least: the least element of the arrays to check, 0-d; None under a trace, or if none is to be checked. An array
            without elements counts as 0. Where several processes add their sums, it is minus the number of those whose
            least element is negative or not a number.
        has_values: whether the numbers can be looked at.
    """

    sums: list[Array]
    least: Array | None
    has_values: bool


def sums_of_products(
    factors: Factors,
    groups: Sequence[Sequence[Row]],
    nonnegative: Sequence[int] = (),
    reduce: Reduce | None = None,
) -> SumsOfProducts:
    """Return for each group of rows the sums of products whose factors are computed element by element.

    Args:
        factors: the two factors of each product. In JAX it is compiled, so give the same function object every time.
        groups: rows of arrays, all of one framework; at least one group, and at least one row in each.
        nonnegative: the positions in a row of the arrays whose least element is to be returned.
        reduce: how numbers are summed over all processes or devices, if the arrays are one's own parts. Arrays that a
            framework distributes (PyTorch's ``DTensor``) need none.

    Returns:
        Sums in the arrays' promoted dtype, and at least float32.

    Example:
        >>> rows = [(np.asarray([1.0, 2.0]), np.asarray([3.0, 4.0])), (np.asarray([1.0]), np.asarray([-1.0]))]
        >>> [total] = sums_of_products(lambda row, square: [(row[0], row[1])], [rows]).sums
        >>> total.tolist()
        [10.0]
    """
    arrays = [array for rows in groups for row in rows for array in row]
    shared = shared_by_processes(arrays)
    if shared is not None:
        here = [[_counted(shared, row) for row in rows] for rows in groups]
        return _reduced(sums_of_products(factors, here, nonnegative, reduce), shared.total)
    if reduce is not None:
        return _reduced(sums_of_products(factors, groups, nonnegative), reduce)
    framework, module = framework_for("the value", arrays[0])
    xp = framework.namespace(arrays[0])
    if not framework.have_values(module, arrays):
        in_pieces, spreads = framework.loop(module), framework.spreads(module)
        loop = None if in_pieces is None else partial(in_pieces, module)
        parts = [[_sums_of_row(xp, loop, factors, row, spreads) for row in rows] for rows in groups]
        totals = xp.stack(_promoted(xp, [tree_sum(xp.stack(_promoted(xp, part))) for part in parts]))
        return SumsOfProducts([totals[:, index] for index in range(totals.shape[1])], None, has_values=False)
    # There is nothing to sum in arrays without elements, nor a least element; but a group may have no others.
    groups = [[row for row in rows if math.prod(row[0].shape)] or rows[:1] for rows in groups]
    # What overflows or is not a number is found in the sums; NumPy alone would warn of it before.
    with np.errstate(over="ignore", invalid="ignore"):
        if framework.compiles is not None:
            compiler = framework.compiles(module)
            sums = framework.loop(module), factors, tuple(nonnegative), framework.spreads(module)
            compiled = _compiled(compiler, module, xp, *sums)
            return _by_row(xp, compiled, groups, checks=bool(nonnegative))
        return _by_slab(xp, framework, factors, groups, nonnegative)


def _counted(shared: Shared, row: Row) -> Row:
    """Return what this process has of a row; nothing, if another process counts that part."""
    layout = shared.layout(row)
    parts = [layout.part(array) for array in row]
    return parts if layout.counts else [namespace(part=part).reshape(part, (-1,))[:0] for part in parts]


def _reduced(own: SumsOfProducts, reduce: Reduce) -> SumsOfProducts:
    """Return the sums over all processes, of which each has given its own: one reduction of all numbers."""
    xp, first = namespace(sums=own.sums[0]), own.sums[0]
    failures = xp.zeros_like(first[:1])
    if own.least is not None:
        failures = failures + xp.astype(xp.logical_not(own.least >= 0), first.dtype)
    totals = reduce(xp.concat([*_promoted(xp, own.sums), failures]))
    groups = int(first.shape[0])
    sums = [totals[index * groups : (index + 1) * groups] for index in range(len(own.sums))]
    return SumsOfProducts(sums, -totals[-1] if own.has_values else None, own.has_values)


def _by_slab(
    xp: Any, framework: Framework, factors: Factors, groups: Sequence[Sequence[Row]], nonnegative: Sequence[int]
) -> SumsOfProducts:
    """Where operations are carried out one by one: everything about one slab, then about the next."""
    first = groups[0][0][0]
    slab = framework.slab if framework.on_cpu(first) else ACCELERATOR_SLAB
    # A method, where there is one, takes less time than array-api-compat's function, which shows in small slabs.
    total, smallest = framework.reductions or [
        methodcaller(name) if hasattr(first, name) else getattr(xp, name) for name in ("sum", "min")
    ]
    sums, leasts = _SumsOfSlabs(xp, framework, total, slab), _Numbers(xp, slab)
    _raise_trim_threshold()
    ends, last_kinds, dtype, products = [], None, None, 0
    for rows in groups:
        for kinds, size, pieces in _slabs(xp, rows, slab):
            if kinds != last_kinds:
                dtype = reduction_dtype(xp, **{f"array {index}": piece for index, piece in enumerate(pieces)})
                dtype = dtype if any(kind != dtype for kind in kinds) else None
                last_kinds = kinds
            wide = pieces if dtype is None else [xp.astype(piece, dtype, copy=False) for piece in pieces]
            pairs = factors(wide, framework.square)
            # An array without elements has no least one. Its sum, which is 0, stands there: it passes any check.
            if nonnegative:
                leasts.keep([(smallest if size else total)(wide[index]) for index in nonnegative], size)
            sums.keep(pairs, kinds, size)
            products = len(pairs)
            del pairs, wide  # so that the next slab's take their memory, which is in the cache
        ends.append(sums.end_group() // products)
    values = xp.reshape(sums.numbers.joined(), (-1, products))
    if len(ends) < values.shape[0]:
        values = xp.stack([tree_sum(values[start:end, :]) for start, end in zip([0, *ends], ends, strict=False)])
    least = xp.min(leasts.joined()) if nonnegative else None
    return SumsOfProducts([values[:, index] for index in range(products)], least, has_values=True)


@cache
def _raise_trim_threshold() -> None:
    """Have glibc keep the memory of a slab's results for those of the next slab, once for the whole process.

    glibc returns free memory at the heap's end to the system once that is more than twice the largest block that the
    process has freed so far. If no block was large, every slab's results take new pages, which is two thirds of the
    time of alpha*. So a block of 8 MiB is taken and freed, without touching its pages. That is no more than any program
    does which frees such an array, and where the user has set the allocator's thresholds, those stay. (A program that
    trains with PyTorch asks for more at its start: ``keep_freed_memory`` in ``adapters/torch/run.py``.)
    """
    np.empty(2**23, dtype=np.uint8)


class _SumsOfSlabs:
    """The sums of the products of slabs, of which some frameworks add a few before they sum them.

    A framework does so if it adds products to others, element by element, in less time than it sums them: PyTorch
    multiplies and adds in one pass, and NumPy adds in half the time of a sum. A short slab is added to the beginning of
    a long one.
    """

    def __init__(self, xp: Any, framework: Framework, total: Callable[[Array], Array], slab: int) -> None:
        """Begin with no slab; ``total`` sums a flat array."""
        self.numbers = _Numbers(xp, slab)
        self._xp, self._total, self._dot, self._add_product = xp, total, framework.dot, framework.add_product
        self._added: list[Array] = []  # what is not summed yet, for each product
        self._kinds: tuple[Any, ...] = ()
        self._length = self._slabs = self._size = 0  # of the longest of them; how many they are; all their elements

    def keep(self, pairs: Sequence[tuple[Array, Array]], kinds: tuple[Any, ...], length: int) -> None:
        """Keep the sums of products with these factors; the slab has arrays of these dtypes and of this length."""
        if self._dot is not None and length >= DOT_LENGTH:
            self.numbers.keep([self._dot(self._xp, left, right) for left, right in pairs], length)
            return
        if self._add_product is None or kinds != self._kinds or self._slabs == ADDED_SLABS:
            self._sum_up()
        if self._slabs and self._add_product is not None and length <= self._length:
            for added, (left, right) in zip(self._added, pairs, strict=True):
                self._add_product(added if length == self._length else added[:length], left, right)
        else:
            longest = [left * right for left, right in pairs]
            for products, added in zip(longest, self._added, strict=False):
                beginning = products[: self._length]  # a view
                beginning += added
            self._added, self._kinds, self._length = longest, kinds, length
        self._slabs, self._size = self._slabs + 1, self._size + length

    def end_group(self) -> int:
        """Sum what is not summed yet, and return how many sums there are of all groups so far."""
        self._sum_up()
        return self.numbers.count

    def _sum_up(self) -> None:
        if self._slabs:
            self.numbers.keep([self._total(products) for products in self._added], self._size)
            self._added, self._length, self._slabs, self._size = [], 0, 0, 0


class _Numbers:
    """The numbers that are kept of every slab, in their order, as few arrays at any time.

    An allocator may place a small array where a slab's intermediate results have been. What is left of that place is
    too small for the next slab's results, so they take new memory. If each number stayed an array of its own, this
    would add up to several models (PyTorch with glibc).
    """

    def __init__(self, xp: Any, elements: int) -> None:
        """Begin with none; new numbers are joined once they come from so many elements."""
        self.count = 0
        self._xp, self._elements = xp, elements
        self._new: list[Array] = []
        self._size = 0
        self._arrays: list[tuple[int, Array]] = []

    def keep(self, numbers: Sequence[Array], size: int) -> None:
        """Keep what was computed from so many elements."""
        self._new += numbers
        self.count += len(numbers)
        self._size += size
        if self._size >= self._elements:
            self._join()

    def joined(self) -> Array:
        """Return all numbers, flat."""
        if self._new:
            self._join()
        arrays = [array for _, array in self._arrays]
        return arrays[0] if len(arrays) == 1 else self._xp.concat(_promoted(self._xp, arrays))

    def _join(self) -> None:
        """Join the new numbers, and then arrays of as many joins: log2(n) are left of n, each copied log2(n) times."""
        joins, array = 1, _stacked(self._xp, self._new)
        while self._arrays and self._arrays[-1][0] == joins:
            array = self._xp.concat(_promoted(self._xp, [self._arrays.pop()[1], array]))
            joins *= 2
        self._arrays.append((joins, array))
        self._new, self._size = [], 0


def _slabs(xp: Any, rows: Sequence[Row], slab: int) -> Iterator[tuple[tuple[Any, ...], int, Row]]:
    """Yield dtypes, a length of at most ``slab``, and flat arrays of it: large rows cut, small like ones joined."""
    joined: list[Row] = []
    size, joined_kinds = 0, ()
    for row in rows:
        shape = row[0].shape
        length = math.prod(shape)
        kinds = tuple([array.dtype for array in row])
        flat = row if len(shape) == 1 else [xp.reshape(array, (-1,)) for array in row]
        if length > LARGEST_JOINED:
            if length <= slab:
                yield kinds, length, flat
                continue
            for start in range(0, length, slab):
                end = min(start + slab, length)  # the standard leaves open what lies beyond
                yield kinds, end - start, [array[start:end] for array in flat]
            continue
        if joined and (size + length > JOINED_SLAB or kinds != joined_kinds):
            yield joined_kinds, size, [xp.concat(column) for column in zip(*joined, strict=True)]
            joined, size = [], 0
        joined.append(flat)
        size, joined_kinds = size + length, kinds
    if joined:
        alone = len(joined) == 1
        yield joined_kinds, size, joined[0] if alone else [xp.concat(column) for column in zip(*joined, strict=True)]


def _by_row(
    xp: Any, compiled: Callable[[Row], Array], groups: Sequence[Sequence[Row]], *, checks: bool
) -> SumsOfProducts:
    """Where a row's sums are compiled: one call for each row, whose few numbers are added on the host."""
    parts = [[compiled(row) for row in rows] for rows in groups]
    like = parts[0][0]
    dtype = xp.result_type(*{part.dtype: part.dtype for rows in parts for part in rows})
    numbers = [np.asarray([np.asarray(part, dtype=np.float64) for part in rows]) for rows in parts]
    totals = np.stack([rows.sum(axis=0) for rows in numbers], axis=1)
    sums = [xp.asarray(total, dtype=dtype, device=device(like)) for total in totals]
    if not checks:
        return SumsOfProducts(sums, None, has_values=True)
    least = min(rows[:, -1].min() for rows in numbers)
    return SumsOfProducts(sums[:-1], xp.asarray(least, dtype=dtype, device=device(like)), has_values=True)


@cache
def _compiled(
    compiler: Callable[..., Callable[[Row], Array]],
    module: Any,
    xp: Any,
    loop: Callable[..., Array] | None,
    factors: Factors,
    nonnegative: Sequence[int],
    spreads: bool,
) -> Callable[[Row], Array]:
    """Return the compiled function from a row to its sums and, if something is to be checked, the least element."""

    def terms(row: Row) -> Array:
        sums = _sums_of_row(xp, None if loop is None else partial(loop, module), factors, row, spreads)
        if not nonnegative:
            return sums
        nothing = xp.zeros_like(sums[:1]) + float("inf")
        least = [xp.min(row[index])[None] for index in nonnegative if math.prod(row[0].shape)]
        return xp.concat([sums, xp.min(xp.concat(_promoted(xp, [nothing, *least])))[None]])

    return compiler(terms)


def _sums_of_row(xp: Any, loop: Callable[..., Array] | None, factors: Factors, row: Row, spreads: bool) -> Array:
    """Return the sums of a row's products, [products], without a look at any value."""
    dtype = reduction_dtype(xp, **{f"array {index}": array for index, array in enumerate(row)})
    if spreads:
        pairs = factors([xp.astype(array, dtype, copy=False) for array in row], times_itself)
        return xp.stack([xp.sum(left * right) for left, right in pairs])
    flat = [xp.reshape(array, (-1,)) for array in row]

    def products(pieces: Row) -> list[Array]:
        wide = [xp.astype(piece, dtype, copy=False) for piece in pieces]
        return [left * right for left, right in factors(wide, times_itself)]

    def piece_sums(pieces: Row) -> Array:
        # First the sums of the slabs, element by element, which the compiler fuses with the products.
        slabs = [xp.reshape(product, (-1, LOOP_PIECES[-1])) for product in products(pieces)]
        return xp.stack([tree_sum(tree_sum(slab)) for slab in slabs])

    begin, size, parts = 0, int(flat[0].shape[0]), []
    for length in LOOP_PIECES:
        if loop is not None and size - begin >= length:
            end = begin + (size - begin) // length * length
            parts.append(tree_sum(loop(piece_sums, flat, range(begin, end, length), length)))
            begin = end
    if begin < size or not parts:
        rest = flat if begin == 0 else [array[begin:] for array in flat]
        parts.append(xp.stack([xp.sum(product) for product in products(rest)]))
    return sum(parts[1:], parts[0])


def tree_sum(values: Array) -> Array:
    """Return the sum along the first axis, [n, ...] to [...], added in a binary tree; n is at least 1.

    Example:
        >>> float(tree_sum(np.asarray([1.0, 2.0, 4.0])))
        7.0
    """
    xp: Any = namespace(values=values)
    while values.shape[0] > 1:
        half = values.shape[0] // 2
        rest = values[2 * half :, ...]
        values = values[:half, ...] + values[half : 2 * half, ...]
        if rest.shape[0]:
            values = xp.concat([values, rest])
    return values[0, ...]


def _stacked(xp: Any, values: Sequence[Array]) -> Array:
    """Return 0-d arrays, arrays [1] or NumPy's scalars as one array [values] of their promoted dtype."""
    # To stack NumPy's scalars takes a microsecond for each, which is what an operation on a small leaf takes.
    if isinstance(values[0], np.generic):
        return np.asarray(values)
    return (xp.concat if values[0].ndim else xp.stack)(_promoted(xp, values))


def _promoted(xp: Any, arrays: Sequence[Array]) -> Sequence[Array]:
    """Return arrays in their promoted dtype, which is almost always the dtype of each."""
    first = arrays[0].dtype
    if all(array.dtype == first for array in arrays):
        return arrays
    dtype = xp.result_type(*(array.dtype for array in arrays))
    return [xp.astype(array, dtype, copy=False) for array in arrays]
