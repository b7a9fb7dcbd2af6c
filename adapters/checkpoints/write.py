"""The folder of a merged model: it appears whole or not at all, and a merge that was killed goes on where it was.

Sizes are known beforehand. So each file gets its header and its full length first, which also takes the room on the
disk, and every slab is then written at its own place, in any order and by any thread. All this happens in a hidden
folder beside the final one, which gets its name at the very end. A journal in it, a JSON object a line, says what is
done: a merge of the same plan and the same inputs goes on from there, and ends with the same bytes.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from adapters.checkpoints.align import Leaf
from adapters.checkpoints.folders import ADAPTER_CONFIG
from adapters.checkpoints.job import Job
from adapters.checkpoints.resources import TOO_MANY_FILES
from adapters.checkpoints.tensors import DTYPES, SuspendedError, safetensors_header, size_text
from adapters.runs.files import check_free, digest
from adapters.runs.lock import locked
from became_core import BecameError

__all__ = [
    "FileState",
    "Journal",
    "Layout",
    "OutputFolder",
    "file_states",
    "identity",
    "layout_of",
    "layout_of_models",
]

# What the names of the weights of a part of a pipeline of diffusers begin with.
DIFFUSERS = "diffusion_pytorch_model"
# A journal is forced to the disk, with what it speaks of, after this many seconds.
SYNC_SECONDS = 5.0

# A file's absolute path, its size in bytes, and the nanosecond of its last change.
FileState = tuple[str, int, int]


@dataclass(frozen=True)
class Layout:
    """Where everything will lie.

    Attributes:
        leaves: in the order in which they are written.
        files: the name of each file, and its leaves in the order of their bytes.
        headers: what each file begins with.
        places: the file of each leaf, and the byte at which it begins.
        sizes: of the files.
        index_file: the name of the index of the files, if there are several.
    """

    leaves: Sequence[Leaf]
    files: Mapping[str, Sequence[Leaf]]
    headers: Mapping[str, bytes]
    places: Mapping[str, tuple[str, int]]
    sizes: Mapping[str, int]
    index_file: str

    @property
    def nbytes(self) -> int:
        """The bytes of all files."""
        return sum(self.sizes.values())

    def index(self) -> bytes | None:
        """Return the index of the shards; None for a single file."""
        if len(self.files) == 1:
            return None
        total = sum(leaf.size * DTYPES[leaf.dtype].itemsize for leaf in self.leaves)
        weight_map = {leaf.name: name for name, leaves in self.files.items() for leaf in leaves}
        return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode() + b"\n"


def layout_of(leaves: Sequence[Leaf], shard_size: int | None, name: str = "model", framework: str = "pt") -> Layout:
    """Return the layout of a merged model: leaves in their order, in files of at most so many bytes.

    A leaf that is larger than a file has one of its own.

    Args:
        leaves: all of them.
        shard_size: the most bytes of a file; None for one file.
        name: what the files' names begin with.
        framework: whose layout weights have, as the files' metadata says it to the libraries that load them.
    """
    shards: list[list[Leaf]] = [[]]
    used = 0
    for leaf in leaves:
        size = leaf.size * DTYPES[leaf.dtype].itemsize
        if shards[-1] and shard_size is not None and used + size > shard_size:
            shards.append([])
            used = 0
        shards[-1].append(leaf)
        used += size
    count = len(shards)
    names = [f"{name}-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)]
    names = names if count > 1 else [f"{name}.safetensors"]
    # Wide numbers first: so every tensor lies at a multiple of its item's size, which readers that map files want.
    files = {
        file: sorted(shard, key=lambda leaf: -DTYPES[leaf.dtype].itemsize)
        for file, shard in zip(names, shards, strict=True)
    }
    headers, sizes = {}, {}
    places: dict[str, tuple[str, int]] = {}
    for file, shard in files.items():
        entries = [(leaf.name, leaf.dtype, leaf.shape) for leaf in shard]
        headers[file], offsets = safetensors_header(entries, {"format": framework})
        places |= {leaf: (file, offset) for leaf, offset in offsets.items()}
        content = sum(leaf.size * DTYPES[leaf.dtype].itemsize for leaf in shard)
        sizes[file] = len(headers[file]) + content
    return Layout(
        [leaf for shard in files.values() for leaf in shard],
        files,
        headers,
        places,
        sizes,
        f"{name}.safetensors.index.json",
    )


def layout_of_models(job: Job) -> Layout:
    """Return the layout of a merge of whole models, whose files are named as the base's library looks for them."""
    base = next(iter(job.inputs.values()))
    is_of_diffusers = base.path.is_dir() and all(file.name.startswith(DIFFUSERS) for file in base.files)
    name = DIFFUSERS if is_of_diffusers else "model"
    return layout_of(job.alignment.leaves, job.plan.shard_size, name, base.metadata.get("format", "pt"))


def file_states(job: Job) -> Iterator[FileState]:
    """Yield the state of every file of a merge's inputs."""
    for checkpoint in job.inputs.values():
        adapter = [checkpoint.path / ADAPTER_CONFIG] if checkpoint.adapter is not None else []
        for file in (*checkpoint.files, *checkpoint.companions, *adapter):
            state = file.stat()
            yield str(file.absolute()), state.st_size, state.st_mtime_ns


def identity(job: Job) -> str:
    """Return what a merge is known by: its plan, and the names, sizes and times of its files."""
    text = json.dumps([job.plan.as_words(), list(file_states(job))], sort_keys=True)
    return digest(text.encode())


class Journal:
    """What is done of a merge, a JSON object a line."""

    def __init__(self, file: Path, identity: str) -> None:
        """Read what an earlier process wrote for the same merge."""
        self.entries: list[dict[str, Any]] = []
        self.goes_on = False
        try:
            content = file.read_bytes()
        except OSError:
            content = b""
        end = 0
        for line in content.splitlines(keepends=True):
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if not isinstance(entry, dict):
                break  # a process was killed, or a machine stopped, while it wrote
            self.entries.append(entry)
            end += len(line)
        self.goes_on = bool(self.entries) and self.entries[0].get("merge") == identity
        self._file = file
        if not self.goes_on:
            self.entries, end = [], 0
        self._end, self._identity = end, identity
        self._handle: BinaryIO | None = None

    def begin(self) -> None:
        """Open the file for what is to come."""
        self._handle = self._file.open("ab")
        self._handle.truncate(self._end)
        if not self.goes_on:
            self.append({"merge": self._identity}, lasting=True)  # so that other machines see it

    def append(self, entry: dict[str, Any], *, lasting: bool = False) -> None:
        """Write one more line; a lasting one survives a crash of the machine."""
        assert self._handle is not None, "the journal has not begun"
        self._handle.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
        self._handle.flush()
        if lasting:
            os.fsync(self._handle.fileno())

    def close(self) -> None:
        """Close the file, if it is open."""
        if self._handle is not None:
            self._handle.close()


class OutputFolder:
    """The hidden folder in which a merged model is made."""

    def __init__(self, out: Path, layout: Layout) -> None:
        """Touch nothing yet."""
        self.out, self.layout = out, layout
        self.folder = out.with_name(f".{out.name}.merging")
        self._handles: dict[str, int] = {}

    @contextmanager
    def opened(self, merge: str) -> Iterator[Journal]:
        """Hold the folder for one process, with all files at their full length.

        Args:
            merge: what the merge is known by; the folder of another merge is begun anew.

        Raises:
            BecameError: if another process is at work in it, the disk has no room, or the final folder exists.
        """
        check_free(self.out)
        with locked(self.folder.with_name(f"{self.folder.name}.lock")):
            journal = Journal(self.folder / "journal.jsonl", merge)
            if not journal.goes_on:
                shutil.rmtree(self.folder, ignore_errors=True)
            self.check_room()
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                journal.begin()
                for name in self.layout.files:
                    self._open(name)
                yield journal
            except OSError as error:
                raise self._what_failed(error) from None
            except SuspendedError:
                raise
            except BecameError:
                # The same plan would fail again, so that there is nothing to go on with.
                shutil.rmtree(self.folder, ignore_errors=True)
                raise
            finally:
                journal.close()
                self._close()

    @contextmanager
    def joined(self, merge: str, files: Iterable[str]) -> Iterator[None]:
        """Write into files of a folder that another process holds; at the end, what was written is on the disk.

        Args:
            merge: what the merge is known by.
            files: their names.

        Raises:
            SuspendedError: if the folder is that of another merge.
        """
        try:
            for name in files:
                # For writing alone. NFS then sends the bytes that were written; otherwise it may send the whole page
                # around them, of which another machine may have written a part.
                self._handles[name] = os.open(self.folder / name, os.O_WRONLY)
            # Whoever begins another merge here makes its journal before its files: so ours are of this one.
            if not self.is_of(merge):
                raise SuspendedError(f"another merge was begun in {self.folder}.")
            yield
            self.sync()
        finally:
            self._close()

    def is_of(self, merge: str) -> bool:
        """Return whether the folder is there, and that of a merge."""
        try:
            with (self.folder / "journal.jsonl").open("rb") as journal:
                return bool(json.loads(journal.readline()) == {"merge": merge})
        except (OSError, ValueError):
            return False

    def write(self, name: str, offset: int, content: Any) -> None:
        """Write bytes of a leaf, from a place within it; raises an OSError as the system does."""
        file, begin = self.layout.places[name]
        view, done = memoryview(content), 0
        while done < len(view):
            done += os.pwrite(self._handles[file], view[done:], begin + offset + done)

    def sync(self) -> None:
        """Force what was written to the disk."""
        for handle in self._handles.values():
            os.fsync(handle)

    def finish(self, journal: Journal, others: Mapping[str, bytes], copies: Mapping[str, Path]) -> None:
        """Add the other files of the model, and give the folder its name.

        Args:
            journal: of this merge, which ends.
            others: the content of files by name.
            copies: files to copy by their names in the folder, unless they are among the others.
        """
        index = self.layout.index()
        contents = dict(others) | ({self.layout.index_file: index} if index is not None else {})
        for name, file in copies.items():
            if name not in contents:
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, self.folder / name)
        for name, content in contents.items():
            (self.folder / name).write_bytes(content)
        self.sync()
        journal.close()
        (self.folder / "journal.jsonl").unlink()
        check_free(self.out)
        self.folder.rename(self.out)

    def check_room(self) -> None:
        """Refuse a disk that has no room for the files; raises a BecameError."""
        parent = next(folder for folder in self.out.absolute().parents if folder.exists())
        there = [self.folder / name for name in self.layout.files]
        taken = sum(file.stat().st_blocks * 512 for file in there if file.exists())
        needed, free = self.layout.nbytes - taken, shutil.disk_usage(parent).free
        if needed > free:
            raise BecameError(f"{self.out} needs {size_text(needed)} and {parent} has {size_text(free)} free.")

    def _close(self) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles = {}

    def _open(self, name: str) -> None:
        handle = os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o666)
        self._handles[name] = handle
        size = self.layout.sizes[name]
        if os.fstat(handle).st_size != size:
            if hasattr(os, "posix_fallocate") and size:
                os.posix_fallocate(handle, 0, size)
            else:  # pragma: no cover # macOS
                os.ftruncate(handle, size)
        os.pwrite(handle, self.layout.headers[name], 0)

    def _what_failed(self, error: OSError) -> BecameError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return BecameError(f"there is no room left for {self.out}; the same command goes on once there is.")
        if error.errno == errno.EMFILE:
            return BecameError(f"cannot write {self.out}: {TOO_MANY_FILES}; the same command then goes on.")
        return BecameError(f"cannot write {self.out}: {error.strerror}.")
