"""
Files that appear whole or not at all.

A run is killed, a disk is full, the power fails: whatever is on the disk afterwards must be complete or
absent. So everything is written under a temporary name and renamed, and a checkpoint is flushed to the disk
first.
"""
import hashlib
import json
import os
import shutil
import subprocess
import zipfile

import torch


def read_json(folder, name):
    """The dict in a JSON file; empty if there is no such file."""
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return {}
    with open(path) as f:
        return json.load(f)


def read_tensors(path):
    """What a file that torch.save wrote holds; nothing in it is executed. It is mapped, not read: tensors
    that nobody touches take no memory. Raises FileNotFoundError, or RuntimeError."""
    try:
        mapped = zipfile.is_zipfile(path)             # files of old versions cannot be
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError:
        raise
    except Exception as e:                            # other files can raise anything, with misleading advice
        raise RuntimeError(f"{path} is not a file of tensors, or it is damaged ({type(e).__name__}); "
                           "copy or download it again") from e


def sha256(path):
    """Hash of a file, as hexadecimal digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def commit():
    """The hash of the commit that is checked out here; empty if this is not a clone."""
    try:
        git = subprocess.run(["git", "-C", os.path.dirname(__file__), "rev-parse", "HEAD"],
                             capture_output=True, text=True)
    except OSError:                                   # there is no git
        return ""
    return git.stdout.strip()


def flush(path):
    """Force a file or folder to the disk, so that it is there after a power cut."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


def replace_file(path, text):
    """Write a text file, whole or not at all."""
    with open(f"{path}.{os.getpid()}.tmp", "w") as file:
        file.write(text)
    os.replace(file.name, path)


class Lines(dict):
    """A file that grows by a line of JSON for each key, and is a dict of what it holds. A line that a kill
    cut off is not there, and the next one takes its place."""

    def __init__(self, path):
        """Raises ValueError if the file holds something else."""
        super().__init__()
        self.path, self.size = path, 0
        if os.path.exists(path):
            with open(path, "rb") as file:
                for line in file:
                    if line.endswith(b"\n"):
                        try:
                            self.update([json.loads(line)])
                        except (TypeError, ValueError) as e:
                            raise ValueError(f"{path}: it is damaged at byte {self.size}; delete it") from e
                        self.size += len(line)

    def add(self, key, value):
        """Keep a value under a new key."""
        self[key] = value
        with open(self.path, "ab") as file:
            file.truncate(self.size)
            self.size += file.write(json.dumps([key, value]).encode() + b"\n")


def replace_folder(tmp, folder):
    """Rename folder `tmp` to `folder`; what stood there is deleted only after the new one is in place."""
    old = folder.rstrip("/") + ".old"
    shutil.rmtree(old, ignore_errors=True)
    if os.path.isdir(folder):
        os.replace(folder, old)
    os.replace(tmp, folder)
    shutil.rmtree(old, ignore_errors=True)
