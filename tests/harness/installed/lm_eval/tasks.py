"""Where tasks are looked for."""

from typing import Any


class TaskManager:
    def __init__(self, include_path: Any = None) -> None:
        self.include_path = include_path
