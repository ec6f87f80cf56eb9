"""Images as overlay layers on disk, each under the hash of what it holds. For the backends made of namespaces.

host            this machine's /usr, read-only, over a small root file system of its own
base            this machine's own shell tools, git and Python in a small writable root file system
PATH            rootfs tar (compressed or not), rootfs folder, or a folder with a Dockerfile
NAME            $CLAWRL_SANDBOX_HOME/images/NAME (folder) or NAME.tar, .tar.gz, .tar.xz; else docker's image
snapshot:ID     what `snapshot` gave
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from clawrl.errors import SandboxError
from envs.sandbox import hostroot, labels, mapped
from envs.sandbox.labels import Label

FORMAT = "2"
"""Part of every key: layers made by other code than this are not taken."""

_COMPRESSION = {b"\x1f\x8b": "-z", b"BZh": "-j", b"\xfd7zXZ\x00": "-J", b"\x28\xb5\x2f\xfd": "--zstd"}
_HOST_FILES = (
    "alternatives", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "ssl/certs", "ca-certificates.conf", "mime.types",
    "localtime", "timezone", "debian_version", "os-release", "inputrc", "magic", "magic.mime", "python3.11", "perl",
    "protocols", "services", "terminfo", "bash.bashrc", "profile", "java-17-openjdk",
)  # fmt: skip
_known: dict[tuple, str] = {}
_threads = threading.RLock()


@dataclass(frozen=True)
class Image:
    """layers: folders relative to home, topmost first; binds: the host's folders that are shown read-only."""

    layers: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    workdir: str | None = None
    binds: tuple[str, ...] = ()

    def save(self, folder: Path) -> None:
        (folder / "image.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> Image:
        found = json.loads((folder / "image.json").read_text())
        return cls(tuple(found["layers"]), found["env"], found["workdir"], tuple(found["binds"]))


def find(name: str, label: Label, build: Callable[[Path], str]) -> Image:
    """The image of that name, its layers made if they are not there yet; `build` gives a Dockerfile folder's image.

    Raises SandboxError if there is no such image, or it cannot be unpacked.
    """
    home = labels.home()
    kind, _, rest = name.partition(":")
    if kind in ("snapshot", "layer") and (folder := home / f"{kind}s" / rest).parent == home / f"{kind}s":
        if not (folder / "image.json").exists():
            raise SandboxError(f"image {name} is not on this machine (any more)")
        return Image.load(folder)
    if name == "host":
        return _made(f"host-{_digest(FORMAT, *_HOST_FILES)}", label, _host, binds=("/usr",))
    if name == "base":
        return _made(base_key(), label, _base)
    path = local_path(name)
    if path is None:
        return _from_docker(name, label)
    if path.is_file():
        return _made(f"tar-{file_hash(path)}", label, lambda root: _unpack_file(path, root))
    if (path / "Dockerfile").is_file():
        return find(build(path), label, build)
    return _made(f"folder-{folder_hash(path)}", label, lambda root: packed(path, lambda stream: _unpack(stream, root)))


def local_path(name: str) -> Path | None:
    """The file or folder that an image name means: one of $CLAWRL_SANDBOX_HOME/images, or a path; None if neither."""
    named = labels.home() / "images" / name
    if ".." not in Path(name).parts and not name.startswith("/"):
        for each in (named, *(named.with_name(named.name + end) for end in (".tar", ".tar.gz", ".tar.xz"))):
            if each.exists():
                return each.resolve()
    path = Path(name).expanduser()
    return path.resolve() if path.exists() and ("/" in name or path.is_file() or path.is_dir()) else None


def layer(key: str) -> str | None:
    """The image of a layer that was kept before."""
    return f"layer:{key}" if (labels.home() / "layers" / key / "image.json").exists() else None


def keep(key: str, label: Label, image: Image, fill: Callable[[Path], None]) -> str:
    """A new layer on top of an image, filled by `fill`."""
    _made(key, label, fill, below=image)
    return f"layer:{key}"


def new_snapshot(label: Label, image: Image, fill: Callable[[Path], None]) -> str:
    """A new layer on top of an image that lives as long as this process."""
    id = labels.new_id()
    folder = labels.home() / "snapshots" / id
    folder.mkdir()
    labels.write(folder, label)
    _fill(folder, f"snapshots/{id}/root", fill, image)
    return f"snapshot:{id}"


def _made(
    key: str, label: Label, fill: Callable[[Path], None], *, below: Image | None = None, binds: tuple[str, ...] = ()
) -> Image:
    """The layer of that key; made in a labelled folder beside it and renamed, one maker at a time."""
    folder = labels.home() / "layers" / key
    with _threads, _locked(folder.with_name(f".{key}.lock")):
        if not (folder / "image.json").exists():
            new = folder.with_name(f".new-{labels.new_id()}")
            new.mkdir()
            try:
                labels.write(new, label)
                _fill(new, f"layers/{key}/root", fill, below or Image((), binds=binds))
                (new / "label.json").unlink()
                new.rename(folder)
            except BaseException:
                labels.remove_tree(new)
                raise
    return Image.load(folder)


def _fill(folder: Path, name: str, fill: Callable[[Path], None], below: Image) -> None:
    root = folder / "root"
    root.mkdir(mode=0o755)
    mapped.own(root)
    fill(root)
    for mount in ("dev", "proc", "sys", "usr" if below.binds else "dev"):
        if (root / mount).is_symlink():
            raise SandboxError(f"the image's /{mount} is a link; it must be a folder, or not be there")
    Image((name, *below.layers), below.env, below.workdir, below.binds).save(folder)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _unpack(source: IO[bytes], root: Path, compression: str | None = None) -> None:
    """GNU tar refuses names with `..` and makes links that lead out only at the end, when nothing passes them."""
    owner = ["--numeric-owner", "-p"] if mapped.as_root() else ["--no-same-owner", "-p"]
    left_out = ["--exclude=./dev/*", "--exclude=dev/*", "--exclude=./proc/*", "--exclude=proc/*"]
    command = ["tar", "-x", "-f", "-", *([compression] if compression else []), *owner, *left_out, "-C", str(root)]
    mapped.run(command, "unpacking the image", source, forgiven="Cannot mknod")


def _unpack_file(path: Path, root: Path) -> None:
    with path.open("rb") as file:
        start = file.read(8)
        file.seek(0)
        found = [flag for magic, flag in _COMPRESSION.items() if start.startswith(magic)]
        _unpack(file, root, found[0] if found else None)
    if not any((root / each).exists() or (root / each).is_symlink() for each in ("bin", "usr")):
        raise SandboxError(f"image {path} holds neither bin nor usr: it is no root file system")


def packed(path: Path, take: Callable[[IO[bytes]], None]) -> None:
    """Hand a folder on as a tar. Raises SandboxError if not all of it can be read."""
    command = ["tar", "-c", "-f", "-", "--numeric-owner", "-C", str(path), "."]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as packing:
        assert packing.stdout is not None
        assert packing.stderr is not None
        take(packing.stdout)
        said = packing.stderr.read().decode("utf-8", "replace")
    if packing.returncode:
        raise SandboxError(f"image {path} cannot be read whole: {said.strip()[-500:]}")


def base_key() -> str:
    facts: list[str] = [FORMAT]
    for name in (*hostroot.PROGRAMS, hostroot.PYTHON):
        found = shutil.which(name, path=mapped.HOST_PATH)
        facts.append(f"{name} {_stamp(Path(found)) if found else ''}")
    return f"base-{_digest(*facts)}"


def _base(root: Path) -> None:
    hostroot.tar(lambda stream: _unpack(stream, root))


def _host(root: Path) -> None:
    """What programs of /usr look for outside of it: links, names of users, the linker's cache, certificates."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hostroot.skeleton(folder)
        for each in _HOST_FILES:
            source, target = Path("/etc") / each, folder / "etc" / each
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, symlinks=True)
            elif source.exists():
                shutil.copyfile(source, target, follow_symlinks=True)
        shutil.rmtree(folder / "usr")
        (folder / "usr").mkdir()
        hostroot.packed(folder, lambda stream: _unpack(stream, root))


def _from_docker(name: str, label: Label) -> Image:
    """The files of an image that docker has."""
    from envs.sandbox import containers  # docker's client loads only where it is asked for

    id, config = containers.inspect_image(name)
    if config["user"] not in ("", "0", "root"):
        raise SandboxError(f"image {name} runs as user {config['user']!r}; only docker can do that: backend='docker'")
    made = _made(f"docker-{id}", label, lambda root: containers.export(name, lambda tar: _unpack(tar, root)))
    return Image(made.layers, config["env"], config["workdir"], made.binds)


def _stamp(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def file_hash(path: Path) -> str:
    """Of the content; read once as long as the file is not touched."""
    memo = (str(path), _stamp(path))
    if memo not in _known:
        with path.open("rb") as file:
            _known[memo] = _short(hashlib.file_digest(file, "sha256").hexdigest())
    return f"{_known[memo]}-{FORMAT}"


def folder_hash(path: Path) -> str:
    """Of a root file system's names, modes, links and contents, read once as long as no file is touched."""
    if not any((path / each).exists() for each in ("bin", "usr")):
        raise SandboxError(f"image {path} has neither a Dockerfile nor bin or usr: it is no root file system")
    stamps, files = hashlib.sha256(FORMAT.encode()), []
    for folder, folders, names in os.walk(path):
        folders.sort()
        for name in sorted((*folders, *names)):
            each = Path(folder, name)
            found = each.lstat()
            link = os.readlink(each) if stat.S_ISLNK(found.st_mode) else ""
            facts = (str(each.relative_to(path)), found.st_mode, found.st_size * stat.S_ISREG(found.st_mode), link)
            stamps.update(repr((facts, found.st_mtime_ns, found.st_ino, found.st_uid, found.st_gid)).encode())
            files.append((each, facts, (found.st_uid, found.st_gid)))
    memo = (str(path), stamps.hexdigest())
    if memo not in _known:
        content = hashlib.sha256()
        for each, facts, owner in files:
            content.update(repr((facts, owner)).encode())
            if stat.S_ISREG(facts[1]):
                with each.open("rb") as file:
                    content.update(hashlib.file_digest(file, "sha256").digest())
        _known[memo] = _short(content.hexdigest())
    return f"{_known[memo]}-{FORMAT}"


def _digest(*facts: str) -> str:
    return _short(hashlib.sha256(json.dumps(facts).encode()).hexdigest())


def _short(digest: str) -> str:
    return digest[:24]
