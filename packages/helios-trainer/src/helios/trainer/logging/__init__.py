"""The logger and the TensorBoard writer of the run in progress."""

from helios.trainer.logging._loggers import get_root_logger, get_tensorboard_writer

__all__ = ["get_root_logger", "get_tensorboard_writer"]
