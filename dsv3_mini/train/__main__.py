"""`torchrun --nproc-per-node 8 -m dsv3_mini.train --layout dp_shard=8,ep=8 ...`: dsv3 train, in processes that torchrun starts."""

from __future__ import annotations

import sys

from dsv3_mini.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")  # for the processes that it starts itself, too
    sys.exit(main())
