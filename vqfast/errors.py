"""The errors that users catch. Everything else is TypeError or ValueError."""

__all__ = ["BackendError", "CheckpointError", "DataError", "NonFiniteError"]


class BackendError(RuntimeError):
    """A forced backend cannot run these inputs; the text holds the reason of each backend."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, unsafe or does not fit; the text names the path and every
    bad key."""


class DataError(RuntimeError):
    """A picture or a data set cannot be used; the text names the path and the reason."""


class NonFiniteError(RuntimeError):
    """A NaN or an infinity where none may be; the text names the component, or the sample and
    position."""
