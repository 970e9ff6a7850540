"""The logger and the TensorBoard writer of the run in progress."""

from helios.trainer.logging._loggers import RunLoggers, get_root_logger, get_tensorboard_writer
from helios.trainer.logging._places import LogTargets, choose_targets

__all__ = ["LogTargets", "RunLoggers", "choose_targets", "get_root_logger", "get_tensorboard_writer"]
