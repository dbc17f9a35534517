"""Makes Triton's interpreter (TRITON_INTERPRET=1, kernels on a CPU) give right answers: loop bounds known only at run
time under numpy >= 2.4, and tl.dot of bf16, which multiplies the raw bit patterns (both in triton 3.6); and makes it
refuse what a GPU would do in silence: a live load or store outside the tensors of the launch, and a place that two
programs write, whose result depends on who comes last."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _index(tensor) -> int:
    return int(np.asarray(tensor.handle.data).reshape(-1)[0])


def _widened(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


class Memory:
    """The storages that one launch was given, and which program wrote each of their elements."""

    def __init__(self):
        self.spans: dict[int, int] = {}  # first byte: end
        self.writers: dict[tuple[int, int], np.ndarray] = {}

    def hold(self, arguments) -> None:
        storages = [x.untyped_storage() for x in arguments if hasattr(x, "untyped_storage")]
        self.spans = {storage.data_ptr(): storage.data_ptr() + storage.nbytes() for storage in storages}
        self.writers = {}

    def _span(self, at, size: int, what: str) -> int:
        low, high = int(at.min()), int(at.max()) + size
        for start, end in self.spans.items():
            if start <= low and high <= end:
                return start
        raise IndexError(f"A {what} leaves the tensors of its launch.")

    def load(self, at, size: int) -> None:
        if at.size:
            self._span(at, size, "load")

    def store(self, at, size: int, program: int) -> None:
        if not at.size:
            return
        start = self._span(at, size, "store")
        if (start, size) not in self.writers:
            self.writers[start, size] = np.zeros((self.spans[start] - start) // size, np.int32)
        writers, place = self.writers[start, size], (at - np.uint64(start)) // np.uint64(size)
        before = writers[place]
        if ((before != 0) & (before != program)).any():
            raise IndexError("Two programs store to the same place.")
        writers[place] = program


def guard() -> None:
    """Every load and store of every kernel is looked at."""
    memory, builder = Memory(), interpreter.InterpreterBuilder
    given, load, store = (
        interpreter.GridExecutor._init_args_hst,
        builder.create_masked_load,
        builder.create_masked_store,
    )

    def _init_args_hst(self, args_dev, kwargs):
        args, named = given(self, args_dev, kwargs)
        memory.hold([*args, *named.values()])
        return args, named

    def create_masked_load(self, ptrs, mask, other, *options):
        memory.load(ptrs.data[mask.data.astype(bool)], ptrs.get_element_ty().primitive_bitwidth // 8)
        return load(self, ptrs, mask, other, *options)

    def create_masked_store(self, ptrs, value, mask, *options):
        (x, y, z), (wide, high, _) = self.grid_idx, self.grid_dim
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        memory.store(ptrs.data[mask.data.astype(bool)], size, 1 + x + wide * (y + high * z))
        return store(self, ptrs, value, mask, *options)

    interpreter.GridExecutor._init_args_hst = _init_args_hst
    builder.create_masked_load, builder.create_masked_store = create_masked_load, create_masked_store


def repair() -> None:
    """Call once, before the first kernel runs."""
    patch_tensor = interpreter._patch_lang_tensor
    dot = interpreter.InterpreterBuilder.create_dot

    def patched(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", _index)

    def create_dot(self, a, b, d, precision, max_imprecise):
        return dot(self, _widened(a), _widened(b), d, precision, max_imprecise)

    interpreter._patch_lang_tensor = patched
    interpreter.InterpreterBuilder.create_dot = create_dot
