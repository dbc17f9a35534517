"""Makes Triton's interpreter (TRITON_INTERPRET=1, kernels on a CPU) give right answers: loop bounds known only at run
time under numpy >= 2.4, and tl.dot of bf16, which multiplies the raw bit patterns (both in triton 3.6)."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _index(tensor) -> int:
    return int(np.asarray(tensor.handle.data).reshape(-1)[0])


def _widened(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


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
