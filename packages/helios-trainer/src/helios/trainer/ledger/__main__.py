"""The command line: ``python -m helios.trainer.ledger diff A B``."""

import sys

from helios.trainer.ledger._command import main

if __name__ == "__main__":
    sys.exit(main())
