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
    """Unpack below `to`: no absolute names, no links that lead out, no devices, no setuid bits."""
    to.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(fileobj=io.BytesIO(tar), mode="r|*") as stream:
            stream.extractall(to, filter="data")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise SandboxError(f"what the sandbox gave is not a tar that may be unpacked: {error}") from None
