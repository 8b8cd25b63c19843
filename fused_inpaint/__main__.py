# SPDX-License-Identifier: Apache-2.0
"""`python -m fused_inpaint`: the same as the `fused-inpaint` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
