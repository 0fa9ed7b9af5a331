"""Counts on a device become deltas on the host, a look late and never twice."""

import torch
from fake_model import CPU

from service.engine.outliers import LOOK_S, OutlierWatch


def test_each_look_tells_what_the_one_before_it_saw() -> None:
    now = 0.0
    qkv, down = torch.tensor([3, 100]), torch.tensor([0, 0])  # what a start's own steps have counted
    watch = OutlierWatch({"qkv_proj.0": qkv, "down_proj.0": down}, CPU, lambda: now)
    qkv += torch.tensor([2, 50])
    assert watch.look() is None, "too early"
    now += LOOK_S
    assert watch.look() is None, "on its way"
    qkv += torch.tensor([1, 10])
    down += torch.tensor([0, 20])
    now += LOOK_S
    assert watch.look() == {"qkv_proj.0": [2, 50]}
    now += LOOK_S
    assert watch.look() == {"qkv_proj.0": [1, 10], "down_proj.0": [0, 20]}
    now += LOOK_S
    assert watch.look() is None, "nothing has changed"


def test_nothing_to_watch() -> None:
    assert OutlierWatch({}, CPU, lambda: 1e9).look() is None
