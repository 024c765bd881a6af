"""A case as in `ranks_script`, whose ranks do not agree on the number of their forwards."""

import sys
from pathlib import Path

from sg_opd_trl.teachers import local
from sharded import ranks_script

if __name__ == "__main__":
    local.agree_on_calls = lambda accelerator, calls: calls
    print("Every rank has begun", flush=True)
    ranks_script.main(Path(sys.argv[1]), sys.argv[2:])
