"""`python -m open_qwen2vl.cli`, which accelerate can launch."""

import sys

from . import main

sys.exit(main())
