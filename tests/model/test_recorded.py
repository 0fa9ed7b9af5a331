"""A recorded decode is the decoder's own, bit for bit, whatever it reads next."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from tiny_models import decode_batch, load_instance, make_checkpoint, one_sequence
from torch import Tensor

from service.kernels import native
from service.kernels.native.recording import Arena, Recorder, UnrecordableError, record
from service.model.batch import BLOCK_TOKENS, PagedKV
from service.model.instance import ModelInstance
from service.model.recorded import LEAST_BLOCKS, MOST_ROWS

pytestmark = pytest.mark.skipif(native.load() is None, reason=native.absence())
# every linear's outputs are blocks of 64, and heads multiples of 32: all of it is native
SHAPE = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 192, "num_hidden_layers": 3}
NUM_BLOCKS = 2 * LEAST_BLOCKS + 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    make_checkpoint(folder, "llama", torch.bfloat16, **SHAPE, max_position_embeddings=2048)
    return folder


def filled(model: ModelInstance, seed: int = 1) -> PagedKV:
    """A cache with something in every block."""
    kv = model.new_kv(NUM_BLOCKS)
    for tensor in kv.tensors:
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)))
    return kv


def copied(model: ModelInstance, kv: PagedKV) -> PagedKV:
    other = model.new_kv(NUM_BLOCKS)
    for to, tensor in zip(other.tensors, kv.tensors, strict=True):
        to.copy_(tensor)
    return other


def layer_by_layer(
    model: ModelInstance, sequences: list[list[int]], tables: list[list[int]], kv: PagedKV
) -> Tensor:
    """Of the same step, on a copy of the cache."""
    batch, decoder = decode_batch(sequences, tables), model.decoder
    step = decoder.prepare(batch, copied(model, kv))
    with torch.inference_mode():
        hidden, delta = decoder.all_layers(decoder.embed(batch.token_ids), step)
        return decoder.logits(hidden, delta, batch.logit_rows)


@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4", "fp8"])
def test_replays_are_the_decoder_s_own(folder: Path, precision: str) -> None:
    model = load_instance(folder, precision)
    kv = filled(model)
    generator = torch.Generator().manual_seed(2)
    for lengths in ((5,), (6,), (16,), (17,), (3, 40, 90), (4, 41, 91), (530,), (200,), (7, 7, 7)):
        sequences = [torch.randint(3, 128, (length,), generator=generator).tolist() for length in lengths]
        order = (torch.randperm(NUM_BLOCKS - 1, generator=generator) + 1).tolist()
        tables = [[order.pop() for _ in range(-(-length // BLOCK_TOKENS))] for length in lengths]
        want = layer_by_layer(model, sequences, tables, kv)
        got = model.forward(decode_batch(sequences, tables), kv)
        assert torch.equal(got, want), lengths
    recorded = model.decoder.recordings._recorded
    assert sorted(recorded) == [(1, LEAST_BLOCKS), (1, 2 * LEAST_BLOCKS), (3, LEAST_BLOCKS)]
    assert len({each.recording.num_calls for each in recorded.values()}) == 1


def test_a_cache_has_recordings_of_its_own(folder: Path) -> None:
    model = load_instance(folder, "bf16")
    first, second = filled(model, 1), filled(model, 2)
    for kv in (first, first, second, second, first):
        want = layer_by_layer(model, [[5] * 20], [[1, 2]], kv)
        assert torch.equal(model.forward(decode_batch([[5] * 20], [[1, 2]]), kv), want)


def test_what_is_no_decode_of_few_rows_is_not_recorded(folder: Path) -> None:
    model = load_instance(folder, "bf16")
    kv = filled(model)
    model.forward(one_sequence([5] * 20, 0, kv), kv)
    many = MOST_ROWS + 1
    model.forward(decode_batch([[5]] * many, [[1 + row] for row in range(many)]), kv)
    seen: list[str] = []
    model.forward(decode_batch([[5]], [[1]]), kv, lambda path, x: seen.append(path))
    assert seen
    assert not model.decoder.recordings._recorded


def test_what_torch_computes_is_not_recorded(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """float32 is not served by the native kernels: the decoder goes layer by layer, and says so once."""
    caplog.set_level("INFO", "service.model.recorded")
    model = load_instance(folder, "fp32")
    kv = filled(model)
    for _ in range(2):
        want = layer_by_layer(model, [[5] * 20], [[1, 2]], kv)
        assert torch.equal(model.forward(decode_batch([[5] * 20], [[1, 2]]), kv), want)
    assert len(caplog.records) == 1
    assert "outside of the native kernels" in caplog.text


def test_a_place_out_of_range_is_refused_by_a_replay(folder: Path) -> None:
    model = load_instance(folder, "bf16")
    kv = filled(model)
    right = decode_batch([[5] * 20], [[1, 2]])
    model.forward(right, kv)
    right.slots[0] = NUM_BLOCKS * BLOCK_TOKENS
    with pytest.raises(IndexError, match="out of range"):
        model.forward(right, kv)


def test_an_ended_model_is_gone_at_once(folder: Path) -> None:
    gc.disable()
    try:
        model = load_instance(folder, "bf16")
        kv = filled(model)
        model.forward(decode_batch([[5]], [[1]]), kv)
        ended = weakref.ref(model.decoder), weakref.ref(kv)
        del model, kv
        assert [reference() for reference in ended] == [None, None]
    finally:
        gc.enable()


# --- the recorder --------------------------------------------------------------------------------


def test_an_arena_hands_out_the_same_memory_again() -> None:
    arena = Arena()
    first = [arena.take(torch.Size(shape), torch.float32) for shape in ((3, 5), (2,), (400, 1000))]
    assert all(tensor.data_ptr() % 64 == first[0].data_ptr() % 64 for tensor in first)
    first[0].fill_(1)
    first[1].fill_(2)
    first[2].fill_(3)
    assert [tensor.unique().item() for tensor in first] == [1, 2, 3]
    held = arena.num_bytes
    arena.restart()
    again = [arena.take(tensor.shape, tensor.dtype) for tensor in first]
    assert [tensor.data_ptr() for tensor in again] == [tensor.data_ptr() for tensor in first]
    assert arena.num_bytes == held


def test_what_a_replay_would_leave_out_is_named() -> None:
    library = native.load()
    assert library is not None
    x = torch.ones(2, 2)
    for compute in (lambda _: x + 1, lambda _: torch.arange(3), lambda _: x.t().contiguous()):
        with pytest.raises(UnrecordableError, match="aten"):
            record(library, Arena(), compute)
    assert library.recorded is None

    def allowed(recorder: Recorder) -> Tensor:
        return torch.empty_like(x).view(4)[1:].new_empty(5, dtype=torch.int64)

    result, recording = record(library, Arena(), allowed)
    assert result.shape == (5,)
    assert result.dtype == torch.int64
    assert recording.num_calls == 0
    recording.replay()
