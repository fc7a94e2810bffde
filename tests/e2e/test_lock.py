"""One process at a time trains in a run folder, and a killed run frees it at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from transfuse.errors import UserError
from transfuse.runs import held
from transfuse.training import Distributed

HOLDER = """
import multiprocessing, sys, time
from pathlib import Path
from transfuse.runs import held
from transfuse.training import Distributed

with held(Path(sys.argv[1]), Distributed()):
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    print(worker.pid, flush=True)
    worker.join()
"""


def test_a_folder_is_held_by_one_process(tmp_path: Path) -> None:
    """The lock does not pass to forked loader workers, which outlive a killed run by seconds."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    worker = int(holder.stdout.readline())
    try:
        with pytest.raises(UserError, match="expected a run that nobody else trains"), held(tmp_path, Distributed()):
            pass
        holder.kill()
        holder.wait()
        os.kill(worker, 0)  # still alive
        with held(tmp_path, Distributed()):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    message = "run: expected a folder to write to, found Not a directory"
    with pytest.raises(UserError, match=message), held(tmp_path / "run", Distributed()):
        pass
