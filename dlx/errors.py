"""Every error that dlx raises on purpose.

    DlxError
    ├── ConfigError     a field or a combination of fields of the configuration
    ├── PolicyError     a decoding policy that cannot work, or does not suit the model
    ├── ModelError      a checkpoint: its folder, config.json, tensors, tokenizer
    ├── ShapeError      a tensor given to an op: its shape, dtype, stride or device
    ├── CapacityError   pages, slots or memory that are not there
    │   └── BusyError   the queue is full; ask again later
    ├── RequestError    the caller's request: prompt or sampling parameters
    └── EngineError     ours: a step that failed

A message says what is wrong, the value, what is allowed and what to do.
"""


class DlxError(Exception):
    """The root of the tree; catch it to catch every deliberate error of dlx."""


class ConfigError(DlxError):
    """A configuration field, or a combination of fields, is not allowed."""


class PolicyError(DlxError):
    """A decoding policy is unknown, impossible, or not what the model was trained for."""


class ModelError(DlxError):
    """A checkpoint cannot be used: no folder, no weights, wrong tensors, unknown architecture."""


class ShapeError(DlxError):
    """An op was given a tensor of the wrong shape, dtype, stride or device."""


class CapacityError(DlxError):
    """Pages, slots or memory do not suffice."""


class BusyError(CapacityError):
    """The queue is full; a request like this one may be taken after about `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestError(DlxError):
    """The caller's prompt or sampling parameters are not allowed."""


class EngineError(DlxError):
    """A step failed through no fault of the caller."""
