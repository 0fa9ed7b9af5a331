"""A layer of Llama-3.1-8B in fp8 as a decode step launches it, with whoever serves its linears, in one CUDA graph."""

import ctypes
import statistics
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from fp8_variants import MULTIPROCESSORS, WIDE, ByTiles, ByTorch, ByTriton, Choice, Nobody
from graph_times import replays_us
from torch import Tensor
from w8_variants import SHAPES, Kernel, cut

from service.engine.kernels_ahead import META
from service.kernels import decode_attention as attention
from service.kernels import launch as launching
from service.kernels.cuda import Launch, TensorMap, kernel_of
from service.kernels.cuda.driver import SWIZZLE_128, driver, tensor_map
from service.kernels.cuda.maps import rows_map
from service.kernels.fp8_linear import triton as fp8
from service.kernels.fp8_linear.reference import quantize_rows
from tests.kernels.decodes import decodes

CUDA = torch.device("cuda")
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, CONTEXT, EPS = 4096, 32, 8, 128, 640, 1e-5
ATTENTION = attention.Shape(HEAD_DIM, HEADS, KV_HEADS, torch.bfloat16, torch.bfloat16)
LAYERS, REPEATS, SAMPLED = 8, 12, 64
LARGEST_ERROR = 3e-3  # relative, in norm, with the rounding to bfloat16, which is 1.7e-3
CARVEOUT, DEFAULT, LARGEST = 9, -1, 100  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, per cent


@dataclass(frozen=True)
class Way:
    """How the kernels between the linears are launched."""

    early: frozenset[str] = (
        frozenset()
    )  # linears before which rows let their successor begin before they wait
    carveout: bool = False

    def __str__(self) -> str:
        if not self.early:
            return "carveout" if self.carveout else "as served"
        return "both" if self.carveout else "first"


AS_SERVED, EVERYWHERE = Way(), frozenset(SHAPES)
WAYS = (AS_SERVED, Way(EVERYWHERE), Way(EVERYWHERE, carveout=True), Way(carveout=True))


def ask_for_shared_memory(share: int) -> None:
    """Of every kernel that makes rows; few_rows_kernel, which needs much, asks for the largest itself."""
    for compiled in launching._compiled.values():
        if compiled.metadata.name == "quantize_kernel":
            driver().call("cuFuncSetAttribute", ctypes.c_void_p(compiled.function), CARVEOUT, share)


@dataclass(frozen=True, eq=False)
class Weight:
    codes: Tensor  # float8_e4m3fn [out, in]
    steps: Tensor  # float32 [out]


def random_weight(shape: tuple[int, int], device: torch.device) -> Weight:
    if device == META:
        codes = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
        return Weight(codes, torch.empty(shape[0], device=device))
    return Weight(*quantize_rows(torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02))


class TileCall:
    """A weight under one variant of w8_tile.cu; arguments in the order of its signature."""

    def __init__(self, choice: ByTiles, weight: Weight, sums: Tensor, arrived: Tensor) -> None:
        self.kernel, self.how, self.kept = choice.kernel, choice.how, (weight, sums, arrived)
        n, k = weight.codes.shape
        self.x_steps, self.y = ctypes.c_void_p(), ctypes.c_void_p()
        self.rows, self.cut_tiles = ctypes.c_int(), ctypes.c_int()
        box = (self.kernel.outputs, 128)
        codes = weight.codes.view(torch.int8)
        w_map = tensor_map(codes.data_ptr(), torch.int8, (n, k), box, SWIZZLE_128)
        nothing = ctypes.c_void_p()
        pointers = [
            ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight.steps, weight.codes, sums, arrived)
        ]
        told = [
            TensorMap(), w_map, self.x_steps, pointers[0], nothing, nothing, pointers[1], self.y, pointers[2],
            pointers[3], nothing, nothing, self.rows, ctypes.c_int(n), ctypes.c_int(k), self.cut_tiles,
            ctypes.c_int(), ctypes.c_float(),
        ]  # fmt: skip
        loaded = kernel_of(self.kernel.program, self.kernel.threads, self.kernel.shared_bytes)
        self.launch = Launch(loaded, told, dependent=True)

    def __call__(self, codes: Tensor, steps: Tensor) -> Tensor:
        (n, k), rows = self.kept[0].codes.shape, len(codes)
        y = codes.new_empty(rows, n, dtype=torch.bfloat16)
        self.x_steps.value, self.y.value = steps.data_ptr(), y.data_ptr()
        blocks, self.cut_tiles.value = cut(self.kernel, self.how, n, k, rows, MULTIPROCESSORS)
        self.rows.value = rows
        self.launch.replace(0, rows_map(codes.view(torch.int8), self.kernel.tile))
        stream = torch._C._cuda_getCurrentRawStream(y.get_device())
        self.launch(blocks, self.kernel.shared_bytes, stream)
        return y


def load(kernel: Kernel) -> None:
    """Compiled and on the device, which gives its blocks the largest shared memory."""
    loaded = kernel_of(kernel.program, kernel.threads, kernel.shared_bytes)
    driver().use_context()
    driver().call("cuFuncSetAttribute", loaded.handle, CARVEOUT, LARGEST)


def graph_us(run: Callable[[], Any]) -> tuple[float, Any]:
    """Median microseconds, and what the captured run gave, as the last replay has left it."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given = run()
    return statistics.median(replays_us(graph, REPEATS)), given


@dataclass
class Product:
    weight: Weight
    codes: Tensor
    steps: Tensor
    y: Tensor

    def error(self) -> float:
        """Relative, of the last outputs and some others."""
        outputs = torch.randint(len(self.weight.codes), (SAMPLED,), device=self.y.device)
        outputs[0] = len(self.weight.codes) - 1
        # as bytes: torch does not gather E4M3
        some = self.weight.codes.view(torch.int8)[outputs].view(torch.float8_e4m3fn).double()
        x = self.codes.double() * self.steps.double()[:, None]
        want = x @ (some * self.weight.steps[outputs].double()[:, None]).t()
        return float((self.y[:, outputs].double() - want).norm() / want.norm())


class Bench:
    """So many rows, the weights of all layers, and what a decode step does with them."""

    def __init__(self, rows: int, weights: list[dict[str, Weight]], sums: Tensor, arrived: Tensor) -> None:
        self.rows, self.weights, self.workspace = rows, weights, (sums, arrived)
        device = next(iter(weights[0].values())).codes.device
        self.x = torch.empty(rows, HIDDEN, device=device, dtype=torch.bfloat16)
        self.gain = torch.ones(HIDDEN, device=device, dtype=torch.bfloat16)
        self.idle = {name: self.x.new_empty(rows, n) for name, (n, _) in SHAPES.items()}
        if device != META:
            for tensor in (self.x, *self.idle.values()):
                tensor.normal_()
            self.decode = decodes(ATTENTION, [CONTEXT] * rows, device=device)
            self.caches = [(self.decode.keys.clone(), self.decode.values.clone()) for _ in range(LAYERS)]
            variant = attention.serving(ATTENTION, self.decode.step)
            assert variant is not None, "no attention of ours serves here"
            self.variant = variant
        self.calls: dict[tuple[Choice, str, int], TileCall] = {}

    def multiply(self, choice: Choice, name: str, layer: int, coded: tuple[Tensor, Tensor]) -> Tensor:
        weight = self.weights[layer][name]
        if isinstance(choice, ByTriton):
            return fp8.few_rows(self.x, *coded, weight.codes, weight.steps, None, choice.tile, choice.splits)
        if isinstance(choice, ByTorch):
            scales = coded[1][:, None], weight.steps[None, :]
            y: Tensor = torch._scaled_mm(coded[0], weight.codes.t(), *scales, out_dtype=torch.bfloat16)
            return y
        if isinstance(choice, Nobody):
            return self.idle[name]
        call = self.calls.get((choice, name, layer))
        if call is None:
            call = self.calls[choice, name, layer] = TileCall(choice, weight, *self.workspace)
        return call(*coded)

    def attend(self, qkv: Tensor, layer: int) -> Tensor:
        given = self.decode
        rotary = given.cos, given.sin, None, None, EPS
        y = attention.decode_attention(
            self.variant, qkv, *rotary, *self.caches[layer], given.step, HEAD_DIM**-0.5
        )
        return y.view(self.rows, HIDDEN)

    def layers(self, choices: dict[str, Choice], early: Collection[str] = ()) -> list[Product]:
        """-> the products of the last."""
        hidden, delta, products = self.x, self.x, []
        for layer in range(LAYERS):

            def multiply(name: str, coded: tuple[Tensor, Tensor], layer: int = layer) -> Tensor:
                y = self.multiply(choices[name], name, layer, coded)
                if layer == LAYERS - 1 and not isinstance(choices[name], Nobody):
                    products.append(Product(self.weights[layer][name], *coded, y))
                return y

            hidden, coded = fp8.quantize_normed(hidden, delta, self.gain, EPS, early="qkv" in early)
            attended = self.attend(multiply("qkv", coded), layer)
            delta = multiply("o", fp8.quantize_rows(attended, early="o" in early))
            hidden, coded = fp8.quantize_normed(hidden, delta, self.gain, EPS, early=WIDE in early)
            gate_up = multiply(WIDE, coded)
            delta = multiply("down", fp8.quantize_gated(gate_up, early="down" in early))
        return products

    def chain(self, choices: dict[str, Choice], way: Way = AS_SERVED) -> float:
        """Microseconds a layer; negative where a result is wrong."""
        run = partial(self.layers, choices, way.early)
        run()  # compiles what is not yet
        ask_for_shared_memory(LARGEST if way.carveout else DEFAULT)
        us, products = graph_us(run)
        return signed(us / LAYERS, products, self.workspace[1])

    def alone(self, choice: Choice, name: str) -> float:
        """Microseconds of a linear behind itself."""
        x = torch.randn(self.rows, SHAPES[name][1], device=self.x.device, dtype=torch.bfloat16)
        coded = fp8.quantize_rows(x)

        def run() -> list[Product]:
            numbers = [*range(LAYERS)] * 2
            return [
                Product(self.weights[i][name], *coded, self.multiply(choice, name, i, coded)) for i in numbers
            ]

        us, products = graph_us(run)
        return signed(us / len(products), products[-1:], self.workspace[1])


def signed(us: float, products: Iterable[Product], arrived: Tensor) -> float:
    is_right = all(product.error() <= LARGEST_ERROR for product in products) and not arrived.any()
    return us if is_right else -us
