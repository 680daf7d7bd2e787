"""`python -m dpo_trainer.cli`, which launchers start."""

import sys

from .main import main

sys.exit(main())
