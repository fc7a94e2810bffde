"""One holder at a time, whoever dies, wherever: claims in a shared folder."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from transfuse.errors import UserError
from transfuse.studies import claims
from transfuse.studies.claims import hold, newest_claim


def dead_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def claim(folder: Path, generation: int, host: str, process: int, age: float = 0.0) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"a.{generation}"
    home = claims._home() if host == socket.gethostname() else host
    path.write_text(json.dumps({"host": host, "process": process, "home": home}))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_one_holds_and_lets_go(tmp_path: Path) -> None:
    with hold(tmp_path, "a") as first, hold(tmp_path, "a") as second, hold(tmp_path, "b") as other:
        assert (first, second, other) == (True, False, True)
        found = newest_claim(tmp_path, "a")
        assert found is not None
        assert found.alive
        assert (found.host, found.process) == (socket.gethostname(), os.getpid())
    found = newest_claim(tmp_path, "a")
    assert found is not None
    assert not found.alive
    with hold(tmp_path, "a") as again:
        assert again
    with pytest.raises(RuntimeError), hold(tmp_path, "a"):
        raise RuntimeError
    with hold(tmp_path, "a") as after_a_failure:
        assert after_a_failure


def test_a_dead_process_of_this_machine_is_followed_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claim(tmp_path, 0, socket.gethostname(), dead_process())
    with hold(tmp_path, "a") as held:
        assert held
    assert "a: taken over from" in capsys.readouterr().err


def test_a_process_of_another_container_of_this_name_is_not_taken_for_dead(tmp_path: Path) -> None:
    path = claim(tmp_path, 0, socket.gethostname(), dead_process())
    path.write_text(json.dumps({**json.loads(path.read_text()), "home": "another container"}))
    with hold(tmp_path, "a") as held:
        assert not held


@pytest.mark.parametrize(("age", "free"), [(0.0, False), (claims.DEAD - 60, False), (claims.DEAD + 60, True)])
def test_another_machine_is_followed_when_its_heart_has_stopped(tmp_path: Path, age: float, free: bool) -> None:
    claim(tmp_path, 0, "elsewhere", 1, age)
    with hold(tmp_path, "a") as held:
        assert held is free


def test_a_live_process_that_stands_still_is_followed_too(tmp_path: Path) -> None:
    claim(tmp_path, 0, socket.gethostname(), os.getpid(), claims.DEAD + 60)
    with hold(tmp_path, "a") as held:
        assert held


def test_a_claim_cut_short_is_one_until_it_is_old(tmp_path: Path) -> None:
    path = claim(tmp_path, 0, "", 0)
    path.write_text('{"host": ')
    with hold(tmp_path, "a") as held:
        assert not held
    os.utime(path, (time.time() - claims.DEAD - 1,) * 2)
    with hold(tmp_path, "a") as held:
        assert held


def test_names_that_begin_alike_are_two(tmp_path: Path) -> None:
    with hold(tmp_path, "m-1"), hold(tmp_path, "m-1.5M") as held:
        assert held
        assert newest_claim(tmp_path, "m") is None


def test_the_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT", 0.02)
    with hold(tmp_path, "a"):
        os.utime(tmp_path / "a.0", (0, 0))
        until = time.monotonic() + 5
        while (tmp_path / "a.0").stat().st_mtime == 0 and time.monotonic() < until:
            time.sleep(0.01)
        assert (tmp_path / "a.0").stat().st_mtime > 0


def test_the_heart_goes_on_when_the_folder_was_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that fails once, in any call, must not stop the heart: another would take over."""
    monkeypatch.setattr(claims, "BEAT", 0.02)
    look, failed = claims.newest_claim, threading.Event()

    def failing(folder: Path, name: str) -> Any:
        if threading.current_thread() is not threading.main_thread() and not failed.is_set():
            failed.set()
            raise OSError(errno.ESTALE, "stale file handle")
        return look(folder, name)

    with hold(tmp_path, "a"):
        monkeypatch.setattr(claims, "newest_claim", failing)
        assert failed.wait(5)
        os.utime(tmp_path / "a.0", (0, 0))
        until = time.monotonic() + 5
        while (tmp_path / "a.0").stat().st_mtime == 0 and time.monotonic() < until:
            time.sleep(0.01)
        assert (tmp_path / "a.0").stat().st_mtime > 0


def test_a_folder_to_look_at_alone_can_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(tmp_path, 0, "elsewhere", 1)

    def refused(path: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "touch", refused)
    found = newest_claim(tmp_path, "a")
    assert found is not None
    assert found.alive


def test_whoever_was_taken_over_ends(tmp_path: Path) -> None:
    """A process that stood still must not go on writing beside the one that took over."""
    code = f"""
import sys, time
from pathlib import Path
from typing import Any
from transfuse.studies import claims
claims.BEAT = 0.05
folder = Path({str(tmp_path)!r})
with claims.hold(folder, "a") as held:
    assert held
    (folder / "a.1").write_text('{{"host": "elsewhere", "process": 1}}')
    time.sleep(20)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.returncode == 75
    assert "a: this process stood still for so long that another has taken over" in found.stderr


def _count(folder: Path, rounds: int, clashes: Path, start: float) -> None:
    time.sleep(max(0.0, start - time.time()))
    for number in range(rounds):
        with hold(folder, f"job{number}") as held:
            if held:
                try:
                    (folder / f"inside{number}").touch(exist_ok=False)
                    time.sleep(0.002)
                    (folder / f"inside{number}").unlink()
                except FileExistsError:
                    clashes.touch()


def test_many_processes_never_hold_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "claims"
    folder.mkdir()
    for number in range(40):  # half of the jobs have a dead holder before them
        if number % 2:
            (folder / f"job{number}.0").write_text(json.dumps({"host": socket.gethostname(), "process": 2**22 + 1}))
    context = multiprocessing.get_context("fork")
    start = time.time() + 0.3
    workers = [
        context.Process(target=_count, args=(folder, 40, tmp_path / "clash", start), daemon=True) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert not (tmp_path / "clash").exists()


def test_a_folder_that_can_not_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="expected a folder to write to"), hold(tmp_path / "file", "a"):
        pass
