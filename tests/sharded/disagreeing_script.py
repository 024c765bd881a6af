"""A case as in `ranks_script`, whose ranks do not agree on the number of their forwards, and wait ten seconds."""

import sys
from pathlib import Path

from sharded import launches

launches.COLLECTIVE_PATIENCE = 10  # before the modules that take it over

from sg_opd_trl.teachers import local  # noqa: E402
from sharded import ranks_script  # noqa: E402

if __name__ == "__main__":
    local.agree_on_calls = lambda accelerator, calls: calls
    print("Every rank has begun", flush=True)
    ranks_script.main(Path(sys.argv[1]), sys.argv[2:])
