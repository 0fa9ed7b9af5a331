"""Every error a user can meet, with its HTTP status, its stable code and the fix.

HalftoneError
├── RequestError 400          a request that no retry would mend
│   ├── ContextLengthError 400
│   ├── BodyTooLargeError 413
│   ├── AuthenticationError 401
│   ├── ModelNotFoundError 404
│   └── ConflictError 409     what is under way has to end first
├── OverloadedError 429       the queue is full: come back after `retry_after_s`
├── EngineUnavailableError 503
├── SettingError              a flag, variable or TOML value (exit 2)
├── CheckpointError           the weights cannot be served (exit 3)
├── PrecisionError            the mode does not exist, or does not fit checkpoint or device (exit 3)
├── DeviceError               no usable device (exit 3)
│   └── ShortageError         not enough memory on it
└── SystemProblem             port taken, disk full, output folder in use (exit 4)

A message names the thing in backticks, says what was given and what is accepted; `hint` is the fix on a
line of its own.
"""


class HalftoneError(Exception):
    status = 500
    code = "internal_error"
    type = "server_error"
    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", param: str | None = None, code: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param
        self.code = code or type(self).code

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class RequestError(HalftoneError):
    status = 400
    code = "invalid_request"
    type = "invalid_request_error"


class ContextLengthError(RequestError):
    code = "context_length_exceeded"


class BodyTooLargeError(RequestError):
    status = 413
    code = "body_too_large"


class AuthenticationError(RequestError):
    status = 401
    code = "invalid_api_key"
    type = "authentication_error"


class ModelNotFoundError(RequestError):
    status = 404
    code = "model_not_found"


class ConflictError(RequestError):
    status = 409
    code = "conflict"


class OverloadedError(HalftoneError):
    status = 429
    code = "overloaded"
    type = "rate_limit_error"
    retry_after_s = 1


class EngineUnavailableError(HalftoneError):
    status = 503
    code = "engine_unavailable"
    retry_after_s = 2


class SettingError(HalftoneError):
    code = "invalid_setting"
    exit_code = 2


class CheckpointError(HalftoneError):
    code = "invalid_checkpoint"
    exit_code = 3


class PrecisionError(HalftoneError):
    code = "invalid_precision"
    exit_code = 3


class DeviceError(HalftoneError):
    code = "device_unusable"
    exit_code = 3


class ShortageError(DeviceError):
    """Not enough memory: `needs_bytes` in all, `has_bytes` there for this process; 0: not known."""

    code = "device_memory"

    def __init__(
        self, message: str, *, hint: str = "", code: str = "", needs_bytes: int = 0, has_bytes: int = 0
    ) -> None:
        super().__init__(message, hint=hint, code=code)
        self.needs_bytes = needs_bytes
        self.has_bytes = has_bytes


class SystemProblem(HalftoneError):  # noqa: N818  (a circumstance, not a fault of the caller)
    code = "system_problem"
    exit_code = 4
