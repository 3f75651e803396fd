"""Files that are whole or not there."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from oscopt import History, atomic

SAVE = """
import os, signal, sys
import numpy as np
from oscopt import History, atomic
savez = np.savez_compressed
def half(file, **arrays):
    savez(file, **arrays)
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
np.savez_compressed = half
History().save(sys.argv[1])
"""


@pytest.mark.slow
def test_the_next_save_takes_over_what_a_killed_one_left(tmp_path):
    path = tmp_path / "history.npz"
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", SAVE, str(path)], capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert os.listdir(tmp_path) == [".history.npz.part"]
    History().save(path)
    assert os.listdir(tmp_path) == ["history.npz"] and len(History.load(path)) == 0


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(RuntimeError), atomic.writing(path, "w") as file:
        file.write("half")
        raise RuntimeError
    assert os.listdir(tmp_path) == ["file"] and path.read_text() == "before"
    with atomic.writing(path, "w", keep=tmp_path / "older") as file:
        file.write("x")
    assert path.read_text() == "x" and (tmp_path / "older").read_text() == "before"


def _save(path, value):
    for _ in range(50):
        with atomic.writing(path) as file:
            np.save(file, np.full(1000 + value, value))


def test_several_writers_of_one_file(tmp_path):
    """Each version is whole."""
    path = tmp_path / "array.npy"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_save, args=(path, value)) for value in range(3)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            values = np.load(path)
            assert (values == len(values) - 1000).all()
            seen.add(len(values))
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert seen and os.listdir(tmp_path) == ["array.npy"]


def test_errors_name_the_file_that_was_asked_for(tmp_path, monkeypatch):
    """Not the hidden one; what is there stays."""

    def refused(*_):
        raise PermissionError(13, "Permission denied", "hidden")

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(PermissionError, match="Permission denied: '.*/history.npz'"):
        History().save(tmp_path / "history.npz")
    monkeypatch.undo()
    for path, error in (
        (tmp_path, IsADirectoryError),
        ("", IsADirectoryError),
        ("none/a", FileNotFoundError),
    ):
        with pytest.raises(error) as raised:
            History().save(path)
        assert raised.value.filename == str(Path(path))
    assert not os.listdir(tmp_path)


WRITE = """
import sys
from oscopt import atomic
with atomic.writing(sys.argv[1], "w") as file:
    file.write(chr(0x2212) + chr(0xd7))
"""


@pytest.mark.slow
def test_text_is_utf8_whatever_the_locale(tmp_path):
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", WRITE, str(tmp_path / "a")]
    subprocess.run(command, check=True, env=os.environ | ascii_only)
    assert (tmp_path / "a").read_bytes().decode("utf-8") == "−×"
