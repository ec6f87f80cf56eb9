"""Tar streams between host and sandbox. What comes out of a sandbox is hostile until `unpack` has let it through."""

from __future__ import annotations

import io
import posixpath
import tarfile
from collections.abc import Mapping
from pathlib import Path

from clawrl.errors import SandboxError


def pack(files: Mapping[str, bytes | Path]) -> bytes:
    """A tar of name → content, or the host's file or folder; owned by root, without the host's names or times."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in files.items():
            clean = posixpath.normpath(name).lstrip("/")
            if clean.startswith("..") or clean in ("", "."):
                raise SandboxError(f"file name {name!r} leads out of the folder it is put in")
            if isinstance(content, bytes):
                member = tarfile.TarInfo(clean)
                member.size, member.mode = len(content), 0o644
                tar.addfile(member, io.BytesIO(content))
            else:
                if not content.exists():
                    raise SandboxError(f"{content} cannot be put into the sandbox: there is no such file")
                tar.add(content, clean, filter=_anonymous)
    return buffer.getvalue()


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = 0 if member.isdir() else member.mtime
    return member


def unpack(tar: bytes, to: Path) -> None:
    """Unpack below `to`, which nobody else writes: files, folders, and links that stay inside; nothing else.

    Links are made last, so that no name passes through one. Raises SandboxError for names that lead out.
    """
    to.mkdir(parents=True, exist_ok=True)
    links: list[tuple[Path, str]] = []
    try:
        with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as members:
            for member in members:
                _take(members, member, to, links)
        for path, target in links:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() and not path.is_symlink():
                path.symlink_to(target)
    except (tarfile.TarError, OSError, EOFError, ValueError, KeyError) as error:
        raise SandboxError(f"what the sandbox gave is not a tar that may be unpacked: {error}") from None


def _take(tar: tarfile.TarFile, member: tarfile.TarInfo, to: Path, links: list[tuple[Path, str]]) -> None:
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    if member.name.startswith("/") or ".." in parts:
        raise SandboxError(f"the sandbox gave a file named {member.name!r}, which leads out of its folder")
    path = to.joinpath(*parts)
    if any(each.is_symlink() for each in (path, *path.parents) if each != to and to in each.parents):
        raise SandboxError(f"{member.name!r} would be written through a link that was there before")
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True)
    elif member.issym():
        if _stays(member.linkname, len(parts) - 1):
            links.append((path, member.linkname))
    elif member.isreg() or member.islnk():  # of a hard link, the file it names
        if member.islnk():
            names = [each.name for each in (tar.getmember(member.linkname),) if each.isreg()]
            if not names:
                return
        content = tar.extractfile(member)
        assert content is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with content, path.open("xb") as file:
            while data := content.read(1 << 20):
                file.write(data)
        path.chmod(0o755 if member.mode & 0o100 else 0o644)


def _stays(target: str, depth: int) -> bool:
    """Whether a link at that depth leads to a place inside: `..` only at its beginning, and not too many."""
    parts = [part for part in target.split("/") if part not in ("", ".")]
    up = 0
    while up < len(parts) and parts[up] == "..":
        up += 1
    return not target.startswith("/") and up <= depth and ".." not in parts[up:]
