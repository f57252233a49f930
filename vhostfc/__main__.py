"""python -m vhostfc is the vhostfc command."""

from __future__ import annotations

import sys

from vhostfc.cli import main

sys.exit(main())
