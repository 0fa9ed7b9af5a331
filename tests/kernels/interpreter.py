"""Modules of Triton kernels, run in Triton's interpreter on a CPU: numbers, not races, alignment or speed."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels import ptx


@contextmanager
def interpreted(name: str) -> Iterator[ModuleType]:
    """A copy of the module made under TRITON_INTERPRET, beside whatever this process compiles."""
    pytest.importorskip("triton")
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    copy = importlib.util.spec_from_file_location(f"interpreted_{name.replace('.', '_')}", spec.origin)
    assert copy is not None
    assert copy.loader is not None
    module = importlib.util.module_from_spec(copy)
    with pytest.MonkeyPatch.context() as patch, fresh_kernels(), restored_language():
        patch.setenv("TRITON_INTERPRET", "1")
        import triton.language as tl
        from triton.runtime import interpreter
        from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder
        from triton.runtime.jit import JITFunction

        # what Triton itself wrote in its language (sum, max, cdiv) was made for the compiler at its import
        for namespace in (tl.standard, tl.random, tl):
            for function, value in list(vars(namespace).items()):
                if isinstance(value, JITFunction):
                    patch.setattr(namespace, function, InterpretedFunction(value.fn))
        copy.loader.exec_module(module)
        patched = interpreter._patch_lang_tensor

        def patch_tensor(tensor: Any, scope: Any) -> None:
            patched(tensor, scope)
            # int() of an array of one element, which numpy no longer takes
            scope.set_attr(tensor, "__index__", lambda scalar: scalar.handle.data.item())

        patch.setattr(interpreter, "_patch_lang_tensor", patch_tensor)
        patch.setattr(InterpretedFunction, "__call__", called_by_a_kernel)
        patch.setattr(InterpreterBuilder, "create_dot", dot_of_any_type)
        patch.setattr(InterpreterBuilder, "create_si_to_fp", int_to_float)
        patch.setattr(InterpreterBuilder, "create_fp_trunc", rounded)
        patch.setattr(InterpreterBuilder, "create_fp_to_fp", to_e4m3)
        patch.setattr(InterpreterBuilder, "create_inline_asm", inline_assembly, raising=False)
        with np.errstate(over="ignore"):  # an exponential that is infinite is no accident
            yield module


@contextmanager
def fresh_kernels() -> Iterator[None]:
    """Within, kernels that others import are made anew, and afterwards they are what they were before.

    A kernel is made for the interpreter or the compiler when its module is imported, and stays so.
    """

    def made_by_triton() -> dict[str, ModuleType]:
        return {
            name: module
            for name, module in sys.modules.items()
            if name.startswith("service.kernels.") and name.rpartition(".")[2] in ("triton", "launch")
        }

    def forget(modules: dict[str, ModuleType]) -> None:
        for name in modules:
            parent, _, child = name.rpartition(".")
            del sys.modules[name]
            vars(sys.modules[parent]).pop(child, None)

    before = made_by_triton()
    forget(before)
    try:
        yield
    finally:
        forget(made_by_triton())
        for name, module in before.items():
            parent, _, child = name.rpartition(".")
            sys.modules[name] = module
            setattr(sys.modules[parent], child, module)


@contextmanager
def restored_language() -> Iterator[None]:
    """Afterwards Triton's language is the compiler's again: the interpreter leaves parts of it replaced."""
    import triton.language as tl

    parts = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)
    before = [dict(vars(part)) for part in parts]
    try:
        yield
    finally:
        _prepared.clear()
        for part, attributes in zip(parts, before, strict=True):
            for name in set(vars(part)) - set(attributes):
                delattr(part, name)
            for name, value in attributes.items():
                if vars(part)[name] is not value:
                    setattr(part, name, value)


_prepared: set[str] = set()  # modules of functions whose language is the interpreter's


def called_by_a_kernel(function: Any, *args: Any, **kwargs: Any) -> Any:
    """A device function's call, which Triton (3.6) precedes each time by a preparation that outlives it."""
    from triton.runtime import interpreter

    if function.fn.__module__ not in _prepared:
        interpreter._patch_lang(function.fn)
        _prepared.add(function.fn.__module__)
    return function.rewrite()(*args, **kwargs)


def dot_of_any_type(builder: object, a: Any, b: Any, total: Any, precision: object, imprecise: object) -> Any:
    """tl.dot of the interpreter, which (3.6) multiplies bfloat16's and fp8's bits, and int8 in int8.

    In float64, which is exact for integers; and of numbers leaves next to nothing of the order of sums, which
    in numpy depends on the CPU, the number of rows and a row's place among them.
    """
    from triton.runtime.interpreter import TensorHandle

    left, right = (a.data, b.data) if total.data.dtype == np.int32 else (as_float32(a), as_float32(b))
    product = np.matmul(left.astype(np.float64), right.astype(np.float64)).astype(total.data.dtype)
    return TensorHandle(product + total.data, total.dtype.scalar)


def int_to_float(builder: Any, source: Any, target: Any) -> Any:
    """The same for an integer that becomes bfloat16: by way of float32, as the hardware does."""
    from triton.language import bfloat16, float32

    if target.scalar != bfloat16:
        return builder.cast_impl(source, target)
    return builder.create_fp_trunc(builder.cast_impl(source, float32), target)


def rounded(builder: Any, source: Any, target: Any) -> Any:
    """A conversion to bfloat16 to the nearest, ties to even, where the interpreter cuts bits off."""
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import TensorHandle

    if target.scalar != bfloat16 or source.dtype.scalar != float32:
        return builder.cast_impl(source, target)
    bits = np.ascontiguousarray(source.data).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    nearest = np.where(np.isnan(source.data), np.uint32(0x7FC0), nearest)
    return TensorHandle(nearest.astype(np.uint16), target.scalar)


def to_e4m3(builder: Any, source: Any, target: Any, mode: object) -> Any:
    """float32 to the nearest 8-bit float, ties to even, where the interpreter keeps the integer part."""
    from triton.language import float8e4nv, float32
    from triton.runtime.interpreter import TensorHandle

    assert target.scalar == float8e4nv
    assert source.dtype.scalar == float32
    codes = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.float8_e4m3fn)
    return TensorHandle(codes.view(torch.uint8).numpy(), target.scalar)


@dataclass(frozen=True)
class Assembled:
    """What a kernel's assembly gives, by output."""

    outputs: list[np.ndarray]
    shape: tuple[int, ...]
    types: list[Any]

    def get_result(self, number: int) -> Any:
        from triton.runtime.interpreter import TensorHandle, _get_np_dtype

        kind = self.types[number].scalar
        data = self.outputs[number].view(_get_np_dtype(kind)).reshape(self.shape)
        return TensorHandle(data, kind)


def inline_assembly(
    builder: Any, asm: str, constraints: str, handles: list[Any], types: list[Any], is_pure: bool, pack: int
) -> Assembled:
    outputs = ptx.run(asm, constraints, [handle.data for handle in handles])
    return Assembled(outputs, handles[0].data.shape, types)


def as_float32(handle: Any) -> np.ndarray:
    if handle.dtype.scalar.name == "bf16":
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    if handle.dtype.scalar.name == "fp8e4nv":
        codes = torch.from_numpy(np.ascontiguousarray(handle.data))
        return codes.view(torch.float8_e4m3fn).float().numpy()
    return handle.data.astype(np.float32)
