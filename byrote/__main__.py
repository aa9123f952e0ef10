"""`python -m byrote`: the same as the `byrote` command."""

import sys

from byrote.cli.main import main

sys.exit(main())
