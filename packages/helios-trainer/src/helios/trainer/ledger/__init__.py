"""A ledger of a run: a line for every step, so that two runs can be compared and the first difference is named.

`python -m helios.trainer.ledger diff A B` compares two.
"""

from helios.trainer.ledger._diff import Comparison, Difference, Parting, diff
from helios.trainer.ledger._format import LedgerError
from helios.trainer.ledger._plugin import Ledger

__all__ = ["Comparison", "Difference", "Ledger", "LedgerError", "Parting", "diff"]
