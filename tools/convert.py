"""Rewrite a checkpoint as dlx holds it; a door to `dlx convert`.

python tools/convert.py MODEL OUT [--lora ADAPTER] [--fp8]
"""

from __future__ import annotations

import sys

from dlx.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
