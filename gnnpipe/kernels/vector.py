# mypy: disable-error-code="no-untyped-call"
"""One row of a sparse product as vector instructions, with its sums held in registers.

Why not a plain loop: numba cannot keep an array in registers, so a loop over columns inside a
loop over entries loads and stores the sums once for every few entries; and it fetches nothing
ahead, so rows that are scattered over a large table arrive late.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

VECTOR_BYTES = 64
"""Bytes of one vector; machines with narrower registers split it."""
MAX_VECTORS = 8
"""Vectors of a row that are summed at a time."""
ENTRIES_AHEAD = 16
"""How far ahead table rows are fetched: beyond the end of a row, as rows may have few entries."""

_I1, _I8, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 32, 64))


def _sum_row(  # type: ignore[no-untyped-def]
    typing, num_vectors, table, out, indices, weight, col_scale, gate, entries, row, columns, head
):
    """``out[row, a:b] = sum_e factor_e * table[indices[e], a:b]`` for e in the range ``entries``.

    ``factor_e`` is the product of ``weight[e]``, ``col_scale[j_e]`` and ``gate[j_e]``, each None
    for one; entries whose gate is zero are not read at all. ``columns`` is (a, b); that is
    ``num_vectors`` (a literal) vectors, the last of them possibly in part. ``head`` is (h, H) of
    weights ``[E * H]`` of which every H-th counts, from h; (0, 1) is all. A table of uint16 holds
    bfloat16, the upper half of each float32; one of int16 holds float16.
    """
    if not isinstance(num_vectors, types.IntegerLiteral):
        return None
    pair = types.UniTuple(types.intp, 2)
    arrays = (table, out, indices, weight, col_scale, gate)
    signature = types.void(num_vectors, *arrays, pair, types.intp, pair, pair)

    def generate(context: Any, builder: Any, _: Any, values: Any) -> Any:  # Any: numba's own
        _Row(context, builder, signature.args, values).emit()
        return context.get_dummy_value()

    return signature, generate


class _Row:
    """Emits the code of one :func:`_sum_row`."""

    def __init__(self, context: Any, builder: Any, kinds: Any, values: Any) -> None:
        self.builder = builder
        self.count = kinds[0].literal_value
        arrays = [
            None
            if isinstance(kind, types.NoneType)
            else context.make_array(kind)(context, builder, value)
            for kind, value in zip(kinds[1:7], values[1:7], strict=True)
        ]
        self.table: Any
        self.out: Any
        self.indices: Any
        self.table, self.out, self.indices, self.weight, self.col_scale, self.gate = arrays
        entries, self.row, columns, head = values[7:]
        self.start, self.end = cgutils.unpack_tuple(builder, entries, 2)
        self.column, self.stop = cgutils.unpack_tuple(builder, columns, 2)
        self.head, self.num_heads = cgutils.unpack_tuple(builder, head, 2)
        self.number = ir.FloatType() if kinds[2].dtype == types.float32 else ir.DoubleType()
        self.number_bytes = 4 if kinds[2].dtype == types.float32 else 8
        self.is_half = kinds[1].dtype in (types.uint16, types.int16)
        self.is_float16 = kinds[1].dtype == types.int16
        self.lanes = VECTOR_BYTES // self.number_bytes
        self.vector = ir.VectorType(self.number, self.lanes)
        self.suffix = f"v{self.lanes}f{8 * self.number_bytes}"

    def emit(self) -> None:
        builder = self.builder
        width = builder.extract_value(self.out.shape, 1)
        self.table_width = builder.extract_value(self.table.shape, 1)
        self.mask = self._mask(builder.sub(self.stop, self.column))
        zero = ir.Constant(self.vector, None)
        self.sums = [cgutils.alloca_once(builder, self.vector) for _ in range(self.count)]
        for place in self.sums:
            builder.store(zero, place)
        one = ir.Constant(_I64, 1)
        with cgutils.for_range_slice(builder, self.start, self.end, one, _I64, inc=True) as (
            entry,
            _,
        ):
            self._add_entry(entry)
        base = builder.add(builder.mul(self.row, width), self.column)
        for k, place in enumerate(self.sums):
            self._store(builder.load(place), self._address(self.out, base, k), k)

    def _add_entry(self, entry: Any) -> None:
        builder = self.builder
        self._fetch_ahead(entry)
        j = builder.zext(self._at(self.indices, entry), _I64)
        place = builder.add(builder.mul(entry, self.num_heads), self.head)
        factors = [] if self.weight is None else [(self.weight, place)]
        factors += [] if self.col_scale is None else [(self.col_scale, j)]
        if self.gate is None:
            self._add_row(j, [self._at(*factor) for factor in factors])
            return
        gate = self._at(self.gate, j)
        with builder.if_then(builder.fcmp_unordered("!=", gate, ir.Constant(self.number, 0.0))):
            self._add_row(j, [gate, *(self._at(*factor) for factor in factors)])

    def _add_row(self, j: Any, factors: list[Any]) -> None:
        builder = self.builder
        base = builder.add(builder.mul(j, self.table_width), self.column)
        if factors:
            factor = factors[0]
            for other in factors[1:]:
                factor = builder.fmul(factor, other)
            factor = self._splat(factor, self.number)
            fma = self._declare(f"llvm.fma.{self.suffix}", self.vector, [self.vector] * 3)
        for k, place in enumerate(self.sums):
            part, total = self._read(self._address(self.table, base, k), k), builder.load(place)
            total = (
                builder.call(fma, [part, factor, total]) if factors else builder.fadd(total, part)
            )
            builder.store(total, place)

    def _fetch_ahead(self, entry: Any) -> None:
        builder = self.builder
        ahead = builder.add(entry, ir.Constant(_I64, ENTRIES_AHEAD))
        num_entries = builder.extract_value(self.indices.shape, 0)
        ahead = builder.select(builder.icmp_signed("<", ahead, num_entries), ahead, entry)
        j = builder.zext(self._at(self.indices, ahead), _I64)
        base = builder.add(builder.mul(j, self.table_width), self.column)
        pointer = ir.PointerType(_I8)
        prefetch = self._declare("llvm.prefetch.p0", ir.VoidType(), [pointer, _I32, _I32, _I32])
        read, near, data = (ir.Constant(_I32, number) for number in (0, 3, 1))
        for k in range(self.count):
            address = builder.bitcast(self._address(self.table, base, k), pointer)
            builder.call(prefetch, [address, read, near, data])

    def _mask(self, left: Any) -> Any:
        """Which lanes of the last vector lie inside the row."""
        lanes = ir.VectorType(_I64, self.lanes)
        first = (self.count - 1) * self.lanes
        lane = ir.Constant(lanes, [ir.Constant(_I64, first + k) for k in range(self.lanes)])
        return self.builder.icmp_signed("<", lane, self._splat(left, _I64))

    def _read(self, address: Any, k: int) -> Any:
        """One vector of the table."""
        if not self.is_half:
            return self._load(address, k, self.vector, self.suffix, self.number_bytes)
        builder, wide = self.builder, ir.VectorType(_I32, self.lanes)
        if self.is_float16:
            halves = ir.VectorType(ir.HalfType(), self.lanes)
            loaded = self._load(address, k, halves, f"v{self.lanes}f16", 2)
            return builder.fpext(loaded, self.vector)
        halves = ir.VectorType(ir.IntType(16), self.lanes)
        loaded = builder.zext(self._load(address, k, halves, f"v{self.lanes}i16", 2), wide)
        shift = ir.Constant(wide, [ir.Constant(_I32, 16)] * self.lanes)
        return builder.bitcast(builder.shl(loaded, shift), self.vector)

    def _load(self, address: Any, k: int, vector: Any, suffix: str, align: int) -> Any:
        builder, pointer = self.builder, ir.PointerType(vector)
        address = builder.bitcast(address, pointer)
        if k < self.count - 1:
            loaded = builder.load(address)
            loaded.align = align
            return loaded
        kinds = [pointer, _I32, ir.VectorType(_I1, self.lanes), vector]
        load = self._declare(f"llvm.masked.load.{suffix}.p0", vector, kinds)
        arguments = [ir.Constant(_I32, align), self.mask, ir.Constant(vector, None)]
        return builder.call(load, [address, *arguments])

    def _store(self, value: Any, address: Any, k: int) -> None:
        builder, pointer = self.builder, ir.PointerType(self.vector)
        address = builder.bitcast(address, pointer)
        if k < self.count - 1:
            builder.store(value, address).align = self.number_bytes
            return
        kinds = [self.vector, pointer, _I32, ir.VectorType(_I1, self.lanes)]
        store = self._declare(f"llvm.masked.store.{self.suffix}.p0", ir.VoidType(), kinds)
        builder.call(store, [value, address, ir.Constant(_I32, self.number_bytes), self.mask])

    def _address(self, array: Any, base: Any, k: int) -> Any:
        place = self.builder.add(base, ir.Constant(_I64, k * self.lanes))
        return self.builder.gep(array.data, [place])

    def _at(self, array: Any, place: Any) -> Any:
        return self.builder.load(self.builder.gep(array.data, [place]))

    def _splat(self, value: Any, kind: Any) -> Any:
        nothing = ir.Constant(ir.VectorType(kind, self.lanes), ir.Undefined)
        first = self.builder.insert_element(nothing, value, ir.Constant(_I32, 0))
        zeros = ir.Constant(ir.VectorType(_I32, self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(first, nothing, zeros)

    def _declare(self, name: str, result: Any, kinds: list[Any]) -> Any:
        kind = ir.FunctionType(result, kinds)
        return cgutils.get_or_insert_function(self.builder.module, kind, name)


LANES_PER_BYTE = 8
"""Numbers whose signs make one byte of a mask."""


def _rectify_eight(typing, x, mask, group):  # type: ignore[no-untyped-def]
    """``x = max(x, 0)`` for eight numbers from ``8 group``; ``mask[group]`` tells which stay."""
    signature = types.void(x, mask, types.intp)

    def generate(context: Any, builder: Any, _: Any, values: Any) -> Any:  # Any: numba's own
        eight = _Eight(context, builder, signature.args, values)
        loaded = builder.load(eight.numbers(0))
        loaded.align = eight.number_bytes
        zero = ir.Constant(eight.vector, None)
        # Unordered: a NaN must stay one, as in torch.
        kept = builder.fcmp_unordered(">", loaded, zero)
        builder.store(builder.bitcast(kept, _I8), eight.mask(1))
        builder.store(
            builder.select(kept, loaded, zero), eight.numbers(0)
        ).align = eight.number_bytes
        return context.get_dummy_value()

    return signature, generate


def _keep_eight(typing, x, mask, group, out):  # type: ignore[no-untyped-def]
    """``out = x`` where the mask has a bit, 0 elsewhere, for eight numbers."""
    signature = types.void(x, mask, types.intp, out)

    def generate(context: Any, builder: Any, _: Any, values: Any) -> Any:  # Any: numba's own
        eight = _Eight(context, builder, signature.args, values)
        loaded = builder.load(eight.numbers(0))
        loaded.align = eight.number_bytes
        kept = builder.bitcast(builder.load(eight.mask(1)), ir.VectorType(_I1, LANES_PER_BYTE))
        chosen = builder.select(kept, loaded, ir.Constant(eight.vector, None))
        builder.store(chosen, eight.numbers(3)).align = eight.number_bytes
        return context.get_dummy_value()

    return signature, generate


class _Eight:
    """Addresses of eight numbers and of their byte."""

    def __init__(self, context: Any, builder: Any, kinds: Any, values: Any) -> None:
        self._builder = builder
        self._arrays = {
            k: context.make_array(kinds[k])(context, builder, values[k])
            for k in range(len(kinds))
            if k != 2
        }
        self._group = values[2]
        number = ir.FloatType() if kinds[0].dtype == types.float32 else ir.DoubleType()
        self.number_bytes = 4 if kinds[0].dtype == types.float32 else 8
        self.vector = ir.VectorType(number, LANES_PER_BYTE)

    def numbers(self, k: int) -> Any:
        builder = self._builder
        place = builder.mul(self._group, ir.Constant(_I64, LANES_PER_BYTE))
        address = builder.gep(self._arrays[k].data, [place])
        return builder.bitcast(address, ir.PointerType(self.vector))

    def mask(self, k: int) -> Any:
        return self._builder.gep(self._arrays[k].data, [self._group])


def _draw(typing, row_key, column):  # type: ignore[no-untyped-def]
    """32 random bits for one column of a row.

    Why not in Python: numba multiplies 32-bit numbers in 64 bits, and half as many fit a vector.
    """
    signature = types.uint32(types.uint64, column)

    def generate(context: Any, builder: Any, _: Any, values: Any) -> Any:  # Any: numba's own
        def mixed(bits: Any, shift: int, factor: int) -> Any:
            bits = builder.xor(bits, builder.lshr(bits, ir.Constant(_I32, shift)))
            return builder.mul(bits, ir.Constant(_I32, factor))

        key, place = values[0], context.cast(builder, values[1], column, types.uint32)
        low = builder.trunc(key, _I32)
        high = builder.trunc(builder.lshr(key, ir.Constant(_I64, 32)), _I32)
        bits = builder.xor(low, builder.mul(place, ir.Constant(_I32, 0x9E3779B9)))
        bits = mixed(mixed(builder.add(bits, high), 16, 0x7FEB352D), 15, 0x846CA68B)
        return builder.xor(bits, builder.lshr(bits, ir.Constant(_I32, 16)))

    return signature, generate


# numba's own types are wrong about intrinsics: it passes the first argument itself.
sum_row: Any = intrinsic(_sum_row)
rectify_eight: Any = intrinsic(_rectify_eight)
keep_eight: Any = intrinsic(_keep_eight)
draw: Any = intrinsic(_draw)
