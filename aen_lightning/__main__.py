"""``python -m aen_lightning`` is the ``aen`` command."""

import sys

from aen_lightning.cli.main import main

sys.exit(main())
