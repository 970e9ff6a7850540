"""What differs between two files: values side by side, then bytes, then, only if those differ, numbers (torch)."""

from helios.chkpt._comparison._difference import Difference, DifferenceKind
from helios.chkpt._comparison._files import diff

__all__ = ["Difference", "DifferenceKind", "diff"]
