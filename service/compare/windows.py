"""Evaluation text -> windows of token ids by our own short protocol, stamped with how they were cut.

quality/texts, protocols --Text, Cut--> EvaluationText --windows--> Evaluate messages
"""

from dataclasses import dataclass
from pathlib import Path

from service.quality.protocols import Limits, WordPieces, cut
from service.quality.texts import Text, calibration_text, evaluation_text, refuse_overlap

PROTOCOL = "halftone"


@dataclass(frozen=True)
class EvaluationText:
    """Windows of one text that no calibration has seen."""

    text: Text
    calibration: Text
    windows: list[list[int]]  # each of the same length
    protocol: str  # what exactly the perplexity is of
    tokenizer_sha256: str

    @classmethod
    def prepare(
        cls, path: str, calibration: str, tokenizer: Path, num_windows: int, window_tokens: int
    ) -> "EvaluationText":
        """Files, or halves of the interpreter's documentation where they name none; `tokenizer`: its folder.

        Raises SettingError where the text is too short, or shares words with the calibration text.
        """
        text, calibrated = evaluation_text(path), calibration_text(calibration)
        refuse_overlap(calibrated, text)
        pieces = WordPieces.load(tokenizer, [])
        # whether the engine's context has room for them is the engine's to say
        made = cut(PROTOCOL, text, pieces, Limits(window_tokens, num_windows, window_tokens))
        return cls(text, calibrated, made.windows, f"{PROTOCOL}: {made.words}", pieces.sha256)
