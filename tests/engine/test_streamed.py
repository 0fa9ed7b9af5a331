"""A reference a layer at a time: the numbers of the whole model, in a fraction of its memory."""

import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from tiny_models import load_instance, logits_of, make_checkpoint

from service.engine import streamed
from service.engine.streamed import StreamedModel, in_groups, row_slices
from service.errors import DeviceError, PrecisionError
from service.model.checkpoint import Checkpoint
from service.model.decoder import DecoderLayer
from service.precision import load_backend

CPU = torch.device("cpu")
SEQUENCES = [[(7 * i + 3 * w) % 128 for i in range(20 + 17 * w)] for w in range(4)]
FAMILIES = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "mistral": {"sliding_window": 24},
}


def ignored(tokens: int) -> None:
    pass


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8", "int8:outliers=batch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_whole_model_bit_for_bit(tmp_path: Path, family: str, precision: str) -> None:
    make_checkpoint(tmp_path, family if family != "tied" else "llama", torch.bfloat16, **FAMILIES[family])
    model = StreamedModel(Checkpoint(tmp_path), load_backend(precision), CPU)
    passed = model.through(SEQUENCES, ignored)
    whole = load_instance(tmp_path, precision)
    for number, sequence in enumerate(SEQUENCES):
        got = torch.cat(list(passed.logits(number, [(0, 7), (7, len(sequence))])))
        assert torch.equal(got, logits_of(whole, sequence))


def test_one_layer_lives_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path, "llama", num_hidden_layers=5)
    living: weakref.WeakSet[DecoderLayer] = weakref.WeakSet()
    most = num_built = 0
    built = DecoderLayer.__init__

    def build(self: DecoderLayer, *arguments: object) -> None:
        nonlocal most, num_built
        living.add(self)
        most, num_built = max(most, len(living)), num_built + 1
        built(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(DecoderLayer, "__init__", build)
    advanced: list[int] = []
    StreamedModel(Checkpoint(tmp_path), load_backend("fp32"), CPU).through(SEQUENCES, advanced.append)
    assert (most, num_built) == (1, 5)
    assert sum(advanced) == sum(map(len, SEQUENCES))


PROGRAM = """
import json, resource, sys, time, torch
from pathlib import Path
torch.set_num_threads(1)
from service.engine.evaluate import Evaluation
from service.engine.sources import open_model
from service.engine.startup import load, start
from service.messages import EngineConfig, Evaluate
folder, budget = sys.argv[1], int(sys.argv[2])
config = EngineConfig(model_path=folder, precision="nf4", device="cpu", kv_tokens=256)
serving = start(config, lambda _: None, time.monotonic())
status = Path("/proc/self/status").read_text()
held = 1024 * int(status.partition("VmData:")[2].split()[0])
resource.setrlimit(resource.RLIMIT_DATA, (held + budget, resource.RLIM_INFINITY))
sent = []
windows = [[(7 * i + w) % 128 for i in range(40)] for w in range(3)]
Evaluation(Evaluate(1, windows, ["prefill"], reference="fp32"), serving, config, sent.append).run()
def whole():
    load(config, *open_model(config, "fp32", serving.model.device, lambda *_: None), serving.model.device,
         lambda *_: None, None)
try:
    whole()
    fits = True
except (MemoryError, RuntimeError):
    fits = False
print(json.dumps([fits, sent[-1].error, sent[-1].kl_mean]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_a_reference_larger_than_the_memory_left_is_asked_all_the_same(tmp_path: Path) -> None:
    """100 MB of fp32 weights and 24 MB to hold them in, beside the pages of the file: the whole model fails
    there, its layers do not."""
    make_checkpoint(
        tmp_path, "llama", torch.bfloat16, hidden_size=256, intermediate_size=2048, num_hidden_layers=15
    )
    file_bytes = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert 2 * file_bytes > 100e6
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(file_bytes + 24_000_000)]
    root = Path(__file__).parents[2]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    fits, error, kl_mean = json.loads(ended.stdout.splitlines()[-1])
    assert (fits, error) == (False, "")
    assert kl_mean > 0


def test_a_device_without_room_for_a_layer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path, "llama")

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(streamed, "build_layer", full)
    with pytest.raises(DeviceError, match="one layer at a time of the reference `fp32`"):
        StreamedModel(Checkpoint(tmp_path), load_backend("fp32"), CPU).through(SEQUENCES, ignored)


def test_a_checkpoint_that_the_mode_does_not_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path, "llama")
    source = Checkpoint(tmp_path)
    source.quantization = {"quant_method": "other"}
    with pytest.raises(PrecisionError, match="`bf16` does not read"):
        StreamedModel(source, load_backend("bf16"), CPU)


def test_rows_and_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "LOGIT_ROWS", 4)
    assert row_slices(0, 9) == [(0, 4), (4, 8), (8, 9)]
    assert row_slices(3, 7) == [(3, 7)]
    assert row_slices(5, 5) == []
    sequences = [[0] * size for size in (4, 5, 2, 20, 1)]
    assert in_groups(sequences, 9) == [range(2), range(2, 3), range(3, 4), range(4, 5)]
    assert in_groups(sequences, 1000) == [range(5)]
