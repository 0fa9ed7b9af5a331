"""Reading ahead onto a device, here the CPU: the same threads and bounds, no pinned memory, no streams."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from service.errors import CheckpointError
from service.model import device_reader
from service.model.checkpoint import DTYPES
from service.model.device_reader import DeviceReader, building_order, places

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def tensors(folder: Path) -> dict[str, Tensor]:
    """Two shards, sizes from nothing to several pieces, types of several widths."""
    torch.manual_seed(0)
    first = {
        "model.embed_tokens.weight": torch.randn(300, 7),
        "model.layers.1.mlp.up_proj.weight": torch.randn(64, 64).bfloat16(),
        "model.layers.0.empty": torch.empty(0, 4),
    }
    second = {
        "model.layers.0.mlp.qweight": torch.randint(-9, 9, (33, 5), dtype=torch.int32),
        "model.layers.10.scales": torch.randn(3).half(),
        "lm_head.weight": torch.randn(1, 1),
    }
    save_file(first, folder / "a.safetensors")
    save_file(second, folder / "b.safetensors")
    return first | second


@pytest.fixture
def found(folder: Path, tensors: dict[str, Tensor]) -> dict[str, device_reader.Place]:
    return places(folder, "a.safetensors", DTYPES) | places(folder, "b.safetensors", DTYPES)


def test_order_is_that_of_building(tensors: dict[str, Tensor]) -> None:
    assert building_order(tensors) == [
        "model.embed_tokens.weight",
        "model.layers.0.empty",
        "model.layers.0.mlp.qweight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.10.scales",
        "lm_head.weight",
    ]


@settings(max_examples=25, deadline=None)
@given(data=st.data(), ahead_bytes=st.sampled_from([0, 100, 1 << 20]), num_threads=st.integers(1, 3))
def test_every_tensor_arrives_in_any_order_of_asking(
    data: st.DataObject, ahead_bytes: int, num_threads: int, folder: Path, tensors: dict[str, Tensor]
) -> None:
    found = places(folder, "a.safetensors", DTYPES) | places(folder, "b.safetensors", DTYPES)
    asked = data.draw(st.lists(st.sampled_from(sorted(tensors)), max_size=12))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_reader, "PIECE_BYTES", 256)
        reader = DeviceReader(folder, found, CPU, ahead_bytes=ahead_bytes, num_threads=num_threads)
        try:
            for name in asked:  # one that is asked for twice is read twice
                got = reader.read(name)
                assert got.dtype == tensors[name].dtype
                assert torch.equal(got, tensors[name]), name
        finally:
            reader.close()


def test_what_lies_ahead_is_bounded(folder: Path, found: dict[str, device_reader.Place]) -> None:
    """Nothing beyond the bound is admitted until something is taken."""
    bound = found["model.embed_tokens.weight"].num_bytes
    reader = DeviceReader(folder, found, CPU, ahead_bytes=bound, num_threads=1)
    reader.read("lm_head.weight")  # out of turn: the embedding and the empty tensor are all that may be held
    with reader._changed:
        held = sum(found[name].num_bytes for name in reader._arrivals)
        assert held == reader._held_bytes <= bound
    reader.close()


def test_a_file_that_became_shorter_is_named(tmp_path: Path) -> None:
    save_file({"model.layers.0.w": torch.ones(1000)}, tmp_path / "c.safetensors")
    found = places(tmp_path, "c.safetensors", DTYPES)
    with (tmp_path / "c.safetensors").open("r+b") as stream:
        stream.truncate(2000)
    reader = DeviceReader(tmp_path, found, CPU, num_threads=2)
    with pytest.raises(CheckpointError, match=r"`model.layers.0.w` in `c.safetensors` cannot be read: ends"):
        reader.read("model.layers.0.w")
    reader.close()


def test_a_full_device_gets_what_is_asked_for_and_nothing_ahead(
    folder: Path,
    tensors: dict[str, Tensor],
    found: dict[str, device_reader.Place],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The threads ended without a word when they found no room ahead, and the model waited for ever."""
    admit = DeviceReader._admit

    def without_room(self: DeviceReader, name: str, *, urgent: bool = False) -> None:
        if not urgent:
            raise torch.OutOfMemoryError
        admit(self, name, urgent=True)

    monkeypatch.setattr(DeviceReader, "_admit", without_room)
    reader = DeviceReader(folder, found, CPU, num_threads=2)
    for name in building_order(tensors):
        assert torch.equal(reader.read(name), tensors[name])
    assert all(thread.is_alive() for thread in reader._threads)
    reader.close()
