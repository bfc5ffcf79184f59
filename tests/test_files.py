import signal
import subprocess
import sys

import pytest

from cbp_jax import files

HOLD = """
import pathlib, runpy, sys, time
with runpy.run_path(sys.argv[1])["locked"](pathlib.Path(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_locked_by_another_process_is_refused_until_that_process_is_killed(tmp_path):
    command = [sys.executable, "-c", HOLD, files.__file__, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            with pytest.raises(BlockingIOError, match=f"{tmp_path} is in use by another run; wait .* choose another"):
                with files.locked(tmp_path):
                    raise AssertionError("both hold it")
        finally:
            process.send_signal(signal.SIGKILL)
    with files.locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_not_accepted(tmp_path, monkeypatch):
    """Between opening and locking the file, another run ends and removes it, and a third run begins."""
    lock, rivals = files.fcntl.flock, []

    def late(descriptor, how):
        monkeypatch.undo()
        (tmp_path / files.LOCK_FILE).unlink()
        rivals.append(files.locked(tmp_path))
        rivals[0].__enter__()
        lock(descriptor, how)

    monkeypatch.setattr(files.fcntl, "flock", late)
    with pytest.raises(BlockingIOError), files.locked(tmp_path):
        raise AssertionError("both hold it")
    rivals[0].__exit__(None, None, None)


def test_file_systems_without_locks_are_accepted(tmp_path, monkeypatch):
    def unknown(descriptor, how):
        raise OSError(files.errno.ENOLCK, "no locks available")

    monkeypatch.setattr(files.fcntl, "flock", unknown)
    with files.locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(NotADirectoryError, match=r"thesis\.tex must be a folder"),
        files.locked(tmp_path / "thesis.tex"),
    ):
        raise AssertionError("it holds a file")


def test_errors_other_than_a_full_disk_are_unchanged(tmp_path):
    (tmp_path / "name").mkdir()
    with pytest.raises(IsADirectoryError):
        files.write_whole(tmp_path / "name", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["name"]
