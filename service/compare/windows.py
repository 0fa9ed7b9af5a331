"""Evaluation text -> windows of token ids, stamped with how they were cut.

quality/texts --Text--> EvaluationText --windows--> Evaluate messages
"""

from dataclasses import dataclass
from pathlib import Path

from service.errors import SettingError
from service.front.text import TextCodec
from service.quality.texts import (
    Text,
    calibration_text,
    evaluation_text,
    refuse_overlap,
    spread,
    token_windows,
)


@dataclass(frozen=True)
class EvaluationText:
    """Windows of one text that no calibration has seen."""

    text: Text
    calibration: Text
    windows: list[list[int]]  # each of the same length

    @classmethod
    def prepare(
        cls, path: str, calibration: str, tokenizer: Path, num_windows: int, window_tokens: int
    ) -> "EvaluationText":
        """Files, or halves of the interpreter's documentation where they name none; `tokenizer`: its folder.

        Raises SettingError where the text is too short, or shares words with the calibration text.
        """
        text, calibrated = evaluation_text(path), calibration_text(calibration)
        refuse_overlap(calibrated, text)
        windows = token_windows(text, TextCodec.load(tokenizer).tokenizer, window_tokens)
        if len(windows) < num_windows:
            raise SettingError(
                f"text `{text.name}` has {len(windows)} windows of {window_tokens} tokens; "
                f"{num_windows} are asked for",
                hint="name a longer file with `--text`",
            )
        return cls(text, calibrated, spread(windows, num_windows))

    @property
    def protocol(self) -> str:
        """What exactly the perplexity is of."""
        return (
            f"token perplexity over {len(self.windows)} disjoint windows of {len(self.windows[0])} tokens, "
            "evenly spaced in the text, each scored on its own from its second token"
        )
