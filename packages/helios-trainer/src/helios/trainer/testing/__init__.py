"""Checking that a model of your own is exact: `check_resume` finds the piece of state that it forgets to save."""

from helios.trainer.testing._check import check_resume
from helios.trainer.testing._report import Difference, ResumeError, ResumeReport

__all__ = ["Difference", "ResumeError", "ResumeReport", "check_resume"]
