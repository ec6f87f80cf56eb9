"""Families about archives, compression, encodings and checksums."""

from __future__ import annotations

import base64
import gzip
import hashlib
import random

from envs.terminal.tasks.family import Made, lines_of
from envs.terminal.tasks.words import sentence, some


def pack(rng: random.Random) -> Made:
    name, *words = some(rng, 6)
    files = {f"{name}/{word}.txt": sentence(rng) for word in words}
    junk = {f"{name}/{word}.o": "junk" for word in words[:2]}
    listed = lines_of(sorted(files)).strip()
    return Made(
        f"Pack the folder /work/{name} into /work/{name}.tar.gz (names in it begin with {name}/), without "
        "its .o files.",
        f"tar czf {name}.tar.gz --exclude='*.o' {name}",
        files={**files, **junk},
        goals=[f"[ \"$(tar tzf {name}.tar.gz | grep -v '/$' | LC_ALL=C sort)\" = '{listed}' ]"],
        guards=[f"[ -f {each} ]" for each in (*files, *junk)],
    )


def unpack_nested(rng: random.Random) -> Made:
    outer, middle, inner = some(rng, 3)
    token = f"{rng.getrandbits(48):012x}"
    return Made(
        f"/work/{outer}.tar.gz has archives in it, one inside the other. In the innermost is a file token.txt. Copy it "
        "to /work/token.txt.",
        f"d=$(mktemp -d)\ntar xzf {outer}.tar.gz -C $d\ntar xf $d/{middle}.tar -C $d\n"
        f"gunzip -f $d/{inner}.tar.gz\ntar xf $d/{inner}.tar -C $d\ncp $d/token.txt token.txt",
        setup=f"cd /tmp; echo {token} > token.txt; tar czf {inner}.tar.gz token.txt; tar cf {middle}.tar {inner}.tar.gz"
        f"; tar czf /work/{outer}.tar.gz {middle}.tar; rm token.txt {inner}.tar.gz {middle}.tar",
        expect={"token.txt": token},
        difficulty="medium",
    )


def which_archive(rng: random.Random) -> Made:
    wanted, *words = some(rng, 9)
    home = rng.randrange(8)
    made = "; ".join(
        f"echo {word} > {wanted if n == home else word}.txt; tar cf {word}.tar *.txt; rm *.txt"
        for n, word in enumerate(words)
    )
    return Made(
        f"One of the .tar archives in /work/store holds a file {wanted}.txt. Write the archive's name (such as a.tar) "
        f"to /work/which.txt, and take {wanted}.txt out of it to /work/{wanted}.txt.",
        f"for t in store/*.tar; do if tar tf $t | grep -qx {wanted}.txt; then basename $t > which.txt; "
        f"tar xf $t {wanted}.txt; fi; done",
        setup=f"mkdir -p /work/store; cd /work/store; {made}",
        expect={"which.txt": f"{words[home]}.tar", f"{wanted}.txt": words[home]},
        difficulty="medium",
    )


def wrong_checksum(rng: random.Random) -> Made:
    texts = {f"{word}.dat": sentence(rng) for word in some(rng, 10)}
    sums = [f"{hashlib.sha256(text.encode()).hexdigest()}  {name}" for name, text in texts.items()]
    broken = sorted(rng.sample(list(texts), rng.randrange(1, 4)))
    return Made(
        "/work/files has files and their SHA256SUMS. Write the names of the files whose checksum is wrong, sorted, one "
        "a line, to /work/broken.txt.",
        "(cd files; sha256sum -c SHA256SUMS 2>/dev/null || true) | grep FAILED | cut -d: -f1 | LC_ALL=C sort "
        "> broken.txt",
        files={
            **{f"files/{name}": text + "!" * (name in broken) for name, text in texts.items()},
            "files/SHA256SUMS": lines_of(sums),
        },
        expect={"broken.txt": lines_of(broken)},
        difficulty="medium",
    )


def decode(rng: random.Random) -> Made:
    text = sentence(rng, 8)
    content, steps = text.encode(), []
    for _ in range(rng.randrange(1, 4)):
        if rng.random() < 0.5:
            content, step = base64.encodebytes(content), "base64 -d"
        else:
            content, step = gzip.compress(content, mtime=0), "gunzip"
        steps.append(step)
    content, last = base64.encodebytes(content), "base64 -d"
    pipe = " | ".join([last, *reversed(steps)])
    return Made(
        "/work/message is a line of text that was encoded, in one or more layers of base64 and gzip. Write the text to "
        "/work/text.txt.",
        f"cat message | {pipe} > text.txt",
        files={"message": content},
        expect={"text.txt": text},
        difficulty="hard",
    )
