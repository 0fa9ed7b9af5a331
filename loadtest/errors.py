"""What stops a measurement before it has figures: one line, and the fix on another."""


class LoadTestError(Exception):
    """A flag, a file or a server that cannot be measured."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"error: {self.message}" + (f"\n  hint: {self.hint}" if self.hint else "")
