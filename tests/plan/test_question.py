"""What a plan is asked, as text from a command line or a query: one value too few, one too many, and none."""

import pytest

from service.errors import HalftoneError
from service.plan.question import Question, read_question


def test_nothing_asked_is_answered() -> None:
    assert read_question({}) == Question("", "", 0, 32, (), "")
    assert read_question({"context": "", "concurrency": ""}) == read_question({})


def test_everything_asked() -> None:
    asked = read_question(
        {
            "gpu": "24GiB", "bandwidth": "1TB/s", "context": "8k", "concurrency": "5", "kv_dtype": "int8",
            "precisions": "bf16,nf4:double_quant=on,nf4,int8:threshold=0,skip=o_proj",
        }
    )  # fmt: skip
    modes = ("bf16", "nf4", "int8:threshold=0,skip=o_proj")
    assert asked == Question("24GiB", "1TB/s", 8192, 5, modes, "int8")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("context", "0"), ("context", "-1"), ("context", "8 k"), ("context", "8kk"), ("context", "17m"),
        ("context", "9" * 300), ("concurrency", "1025"), ("concurrency", "many"), ("concurrency", "1.5"),
        ("kv_dtype", "int4"), ("kv_dtype", "AUTO"), ("color", "red"), ("gpu", "x" * 600),
        ("precisions", ",".join(["bf16"] * 33)), ("precisions", "nf5"), ("precisions", "nf4:size=2"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_short_error(name: str, value: str) -> None:
    with pytest.raises(HalftoneError) as caught:
        read_question({name: value})
    assert caught.value.param in (name, None)
    assert len(caught.value.message) < 300
    assert caught.value.exit_code in (2, 3)
