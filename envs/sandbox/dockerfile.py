"""A small builder of Dockerfile folders, without network: it runs the steps in a sandbox and keeps the result.

Knows FROM (one), RUN, COPY, ADD of local files, ENV, ARG, WORKDIR, SHELL; passes over CMD, ENTRYPOINT, EXPOSE, LABEL,
MAINTAINER, VOLUME, STOPSIGNAL, HEALTHCHECK, which say nothing about files. Everything else it refuses by name and line.
The result is cached under the hash of the base image, the Dockerfile and all files beside it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import posixpath
import re
import shlex
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

from clawrl.errors import SandboxError
from envs.sandbox.base import Sandbox
from envs.sandbox.spec import GIB, ExecResult, SandboxSpec

STEP = 900.0
"""Seconds that one RUN may take."""

PASSED_OVER = {"CMD", "ENTRYPOINT", "EXPOSE", "LABEL", "MAINTAINER", "VOLUME", "STOPSIGNAL", "HEALTHCHECK"}
REFUSED = {
    "USER": "commands run as root of the sandbox",
    "ONBUILD": "it needs docker",
}


class Keeper(Protocol):
    """What a backend does for the builder."""

    def identity(self, image: str) -> str:
        """What an image holds, in a word."""
        ...

    def find(self, key: str) -> str | None:
        """The image kept under a key."""
        ...

    def open(self, spec: SandboxSpec) -> Sandbox: ...

    def environment(self, sandbox: Any) -> tuple[dict[str, str], str]:
        """Variables and working directory of the image that a sandbox was opened on."""
        ...

    def keep(self, sandbox: Any, key: str, env: Mapping[str, str], workdir: str) -> str:
        """Keep a sandbox's files as an image."""
        ...


@dataclass(frozen=True)
class Step:
    """One instruction: its line number, its name in capitals, and the rest with continuation lines joined."""

    line: int
    name: str
    rest: str


def parse(text: str) -> list[Step]:
    """Instructions of a Dockerfile; here-documents stay within the rest. Raises SandboxError."""
    steps: list[Step] = []
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        number, line = at + 1, lines[at].strip()
        at += 1
        if not line or line.startswith("#"):
            continue
        while line.endswith("\\") and at < len(lines):
            following = lines[at].strip()
            at += 1
            if not following.startswith("#"):
                line = f"{line[:-1].rstrip()} {following}"
        name, _, rest = line.partition(" ")
        marks = re.findall(r"<<-?(['\"]?)(\w+)\1", rest) if name.upper() in ("RUN", "COPY", "ADD") else []
        for _, mark in marks:
            body = []
            while at < len(lines) and lines[at].strip() != mark:
                body.append(lines[at])
                at += 1
            if at == len(lines):
                raise SandboxError(f"Dockerfile line {number}: the here-document {mark} has no end")
            at += 1
            rest += "\n" + "\n".join([*body, mark])
        steps.append(Step(number, name.upper(), rest.strip()))
    return steps


@dataclass
class _State:
    """What the steps so far have set."""

    folder: Path
    env: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])

    def expand(self, text: str) -> str:
        """$NAME, ${NAME}, ${NAME:-default}, ${NAME:+other}."""

        def value(match: re.Match[str]) -> str:
            if match[0].startswith("\\"):
                return match[0][1:]
            name, operator, other = match[1] or match[4], match[2], match[3] or ""
            found = self.env.get(name, self.arguments.get(name, ""))
            if operator == ":-":
                return found or other
            return other if operator == ":+" and found else "" if operator == ":+" else found

        return re.sub(r"\\\$|\$\{(\w+)(?:(:[-+])([^}]*))?\}|\$(\w+)", value, text)


def build(folder: Path, keeper: Keeper) -> str:
    """The image of a Dockerfile folder. Raises SandboxError that names the line and what to do."""
    try:
        text = (folder / "Dockerfile").read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SandboxError(f"{folder}/Dockerfile cannot be read: {error}") from None
    steps = parse(text)
    state = _State(folder)
    while steps and steps[0].name == "ARG":
        _argument(steps.pop(0), state)
    check(steps, folder)
    base = state.expand(steps[0].rest.split()[0])
    if base.startswith("--"):
        raise _refusal(steps[0], "options of FROM are not known here", folder)
    key = f"build-{_hash(keeper.identity(base), text, folder)}"
    if (kept := keeper.find(key)) is not None:
        return kept
    spec = SandboxSpec(base, 4 * GIB, 1024, None, 8 * GIB, timeout=STEP, limits="best_effort")
    with keeper.open(spec) as sandbox:
        state.env, state.workdir = keeper.environment(sandbox)
        for step in steps[1:]:
            _carry_out(step, state, sandbox)
        return keeper.keep(sandbox, key, state.env, state.workdir)


def check(steps: list[Step], folder: Path) -> None:
    """Refuse what cannot be built, before anything is."""
    if not steps or steps[0].name != "FROM":
        raise SandboxError(f"{folder}/Dockerfile does not begin with FROM")
    known = {"RUN", "COPY", "ADD", "ENV", "ARG", "WORKDIR", "SHELL"} | PASSED_OVER
    for step in steps[1:]:
        if step.name == "FROM":
            raise _refusal(step, "builds of several stages need docker; build the image there and name its tag", folder)
        if step.name == "USER" and step.rest.strip() in ("root", "0", "0:0", "root:root"):
            continue
        if step.name in REFUSED:
            raise _refusal(step, REFUSED[step.name], folder)
        if step.name not in known and step.name != "USER":
            raise _refusal(step, "there is no such instruction here", folder)
        if step.name in ("COPY", "ADD") and (found := re.search(r"--(?!chmod=)(\w+)", step.rest)):
            raise _refusal(step, f"option --{found[1]} is not known here", folder)
        if step.name == "ADD" and re.search(r"(^|\s)(https?|git|ftp)(://|@)", step.rest):
            raise _refusal(step, "there is no network; put the file beside the Dockerfile and COPY it", folder)
        if step.name == "RUN" and step.rest.startswith("--"):
            raise _refusal(step, "options of RUN need docker's own builder", folder)


def _refusal(step: Step, why: str, folder: Path) -> SandboxError:
    shown = step.rest.split("\n")[0][:80]
    return SandboxError(f"{folder}/Dockerfile line {step.line}: {step.name} {shown}: {why}")


def _hash(base: str, text: str, folder: Path) -> str:
    found = hashlib.sha256(json.dumps(["1", base, text]).encode())
    for path in _context(folder):
        name, state = str(path.relative_to(folder)), path.lstat()
        content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        found.update(json.dumps([name, state.st_mode, hashlib.sha256(content).hexdigest()]).encode())
    return found.hexdigest()[:24]


def _context(folder: Path) -> list[Path]:
    """Everything beside the Dockerfile that .dockerignore does not name."""
    ignored: list[str] = []
    if (folder / ".dockerignore").is_file():
        ignored = [line.strip().strip("/") for line in (folder / ".dockerignore").read_text().splitlines()]
        ignored = [line for line in ignored if line and not line.startswith("#")]
        if any(line.startswith("!") for line in ignored):
            raise SandboxError(f"{folder}/.dockerignore: exceptions (!) are not known here; leave them out")
    found = []
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        parts = [name, *(str(each) for each in Path(name).parents)]
        if not any(fnmatch(part, pattern) for part in parts for pattern in ignored):
            found.append(path)
    return found


def _carry_out(step: Step, state: _State, sandbox: Sandbox) -> None:
    if step.name == "RUN":
        _run(step, state, sandbox)
    elif step.name in ("COPY", "ADD"):
        _copy(step, state, sandbox)
    elif step.name == "ENV":
        state.env |= _pairs(step, state)
    elif step.name == "ARG":
        _argument(step, state)
    elif step.name == "WORKDIR":
        state.workdir = posixpath.join(state.workdir, state.expand(step.rest).strip("\"'"))
        _demand(sandbox.exec(["mkdir", "-p", state.workdir], cwd="/"), step, state)
    elif step.name == "SHELL":
        state.shell = _list(step, state) or state.shell


def _argument(step: Step, state: _State) -> None:
    name, equals, value = step.rest.partition("=")
    if equals:
        state.arguments[name] = state.expand(value.strip("\"'"))


def _pairs(step: Step, state: _State) -> dict[str, str]:
    """ENV A=1 B="2 3", and the old ENV A 1."""
    first = step.rest.split(None, 1)
    if "=" not in first[0]:
        return {first[0]: state.expand(first[1] if len(first) > 1 else "")}
    try:
        words = shlex.split(step.rest)
        return {name: state.expand(value) for name, value in (word.split("=", 1) for word in words)}
    except ValueError:
        raise _refusal(step, "this is not a list of NAME=value", state.folder) from None


def _list(step: Step, state: _State) -> list[str] | None:
    """Words of the form ["a", "b"]; None if it is not of that form."""
    if not step.rest.startswith("["):
        return None
    try:
        words = json.loads(step.rest)
    except ValueError:
        return None
    if not (isinstance(words, list) and words and all(isinstance(word, str) for word in words)):
        raise _refusal(step, 'this is not a list of words like ["a", "b"]', state.folder)
    return words


def _run(step: Step, state: _State, sandbox: Sandbox) -> None:
    command = step.rest
    if document := re.fullmatch(r"<<-?(['\"]?)(\w+)\1\n(.*)\n\2", command, re.DOTALL):
        command = document[3]  # the whole step is the script
    env = {**state.arguments, **state.env}
    result = sandbox.exec(_list(step, state) or [*state.shell, command], STEP, env, cwd=state.workdir)
    _demand(result, step, state)


def _demand(result: ExecResult, step: Step, state: _State) -> None:
    if not result.ok:
        ended = "it took too long" if result.timed_out else f"exit status {result.code}"
        raise _refusal(step, f"{ended} (there is no network): {result.output.strip()[-800:]}", state.folder)


def _copy(step: Step, state: _State, sandbox: Sandbox) -> None:
    """Files of the folder go in as docker would put them: owned by root, folders by their contents."""
    rest, mode = step.rest, None
    if found := re.match(r"--chmod=(\S+)\s+", rest):
        mode, rest = found[1], rest[found.end() :]
    if "<<" in rest:
        raise _refusal(step, "here-documents go with RUN only here", state.folder)
    words = _list(Step(step.line, step.name, rest), state) or shlex.split(rest)
    if len(words) < 2:
        raise _refusal(step, "it needs a source and a target", state.folder)
    *sources, target = map(state.expand, words)
    at = posixpath.join(state.workdir, target)
    files = {path for path in _context(state.folder) if path.name != ".dockerignore"}
    found = [path for source in sources for path in _sources(source, step, state, files)]
    folder = target.endswith(("/", ".")) or len(found) > 1 or found[0].is_dir() or _is_folder(sandbox, at)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for path in found:
            if step.name == "ADD" and path.is_file() and tarfile.is_tarfile(path):
                sandbox.put_tar(_plain(path), at)
                continue
            for each in sorted(files if path.is_dir() else [path]):
                if each == path or path in each.parents:
                    _add(tar, each, path, at, folder=folder, mode=mode)
    sandbox.put_tar(buffer.getvalue(), "/")


def _add(tar: tarfile.TarFile, each: Path, source: Path, at: str, *, folder: bool, mode: str | None) -> None:
    inner = str(each.relative_to(source)) if source.is_dir() else source.name if folder else ""
    name = posixpath.normpath(posixpath.join(at, inner)).lstrip("/")
    if not name or name == ".":
        return
    member = tar.gettarinfo(each, name)
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    if mode and not member.isdir():
        member.mode = int(mode, 8)
    if member.isreg():
        with each.open("rb") as file:
            tar.addfile(member, file)
    else:
        tar.addfile(member)


def _plain(path: Path) -> bytes:
    """A tar without its compression, which the sandbox's tar may not know."""
    buffer = io.BytesIO()
    with tarfile.open(path) as packed, tarfile.open(fileobj=buffer, mode="w") as plain:
        for member in packed:
            plain.addfile(member, packed.extractfile(member) if member.isreg() else None)
    return buffer.getvalue()


def _sources(source: str, step: Step, state: _State, files: set[Path]) -> list[Path]:
    clean = posixpath.normpath(source.lstrip("/") or ".")
    if clean.startswith(".."):
        raise _refusal(step, f"{source} lies outside of the folder", state.folder)
    if clean == ".":
        return [state.folder]
    found = [path for path in sorted(files) if fnmatch(str(path.relative_to(state.folder)), clean)]
    found = [path for path in found if str(path.relative_to(state.folder)).count("/") == clean.count("/")]
    if not found:
        raise _refusal(step, f"there is no {source} beside it", state.folder)
    return found


def _is_folder(sandbox: Sandbox, path: str) -> bool:
    return sandbox.exec(["test", "-d", path], cwd="/").ok
