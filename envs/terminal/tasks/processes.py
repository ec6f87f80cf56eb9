"""Families about running things: processes, servers, programs that ask, environments."""

from __future__ import annotations

import random

from envs.terminal.tasks.family import Made
from envs.terminal.tasks.words import sentence, some


def end_process(rng: random.Random) -> Made:
    bad, good = some(rng, 2)
    start = "\n".join(
        f"cp /bin/sleep /usr/local/bin/{name}; setsid {name} 3600 </dev/null >/dev/null 2>&1 &" for name in (bad, good)
    )
    return Made(
        f"A process named {bad} is running and does not end by itself. End it. Leave the process {good} alone.",
        f"pkill -x {bad}\nwhile pgrep -x {bad}; do sleep 0.1; done",
        setup=f"{start}\nuntil pgrep -x {good} && pgrep -x {bad}; do sleep 0.05; done",
        goals=[f"! pgrep -x {bad}"],
        guards=[f"pgrep -x {good}"],
        difficulty="medium",
    )


def serve_file(rng: random.Random) -> Made:
    name, text, port = some(rng, 1)[0], sentence(rng), rng.randrange(8000, 9000)
    ask = (
        f"import urllib.request as u; print(u.urlopen('http://127.0.0.1:{port}/{name}.txt', timeout=5).read().decode())"
    )
    return Made(
        f"Serve the folder /work/site over HTTP on 127.0.0.1, port {port}, so that /{name}.txt can be had there. The "
        "server must go on running in the background, without your terminal.",
        f"cd site\nsetsid python3 -m http.server {port} --bind 127.0.0.1 </dev/null >/dev/null 2>&1 &\n"
        f"for i in $(seq 50); do if (echo > /dev/tcp/127.0.0.1/{port}) 2>/dev/null; then break; fi; sleep 0.1; done",
        files={f"site/{name}.txt": text},
        goals=[f'[ "$(python3 -I -c "{ask}")" = \'{text}\' ]'],
        difficulty="hard",
    )


def answer_program(rng: random.Random) -> Made:
    word, code, token = some(rng, 1)[0], rng.randrange(1000, 9999), f"{rng.getrandbits(48):012x}"
    program = (
        "import sys\nif not sys.stdin.isatty():\n    sys.exit('vault: needs a terminal')\n"
        "w = input('Word? ')\nc = input('Code? ')\ny = input('Open (yes/no)? ')\n"
        "import hashlib\nk = hashlib.sha256(f'{w}/{c}/{y}'.encode()).digest()[:6]\n"
        "print(bytes(a ^ b for a, b in zip(k, bytes.fromhex(open('/work/.sealed').read()))).hex())\n"
    )
    from hashlib import sha256

    key = sha256(f"{word}/{code}/yes".encode()).digest()[:6]
    sealed = bytes(a ^ b for a, b in zip(key, bytes.fromhex(token), strict=True)).hex()
    return Made(
        f"Run `python3 /work/vault.py`. It asks questions and works in a terminal only. The word is {word}, the code "
        f"{code}, and it must be opened. Write the number that it then prints to /work/token.txt.",
        f"printf '{word}\\n{code}\\nyes\\n' | script -qec 'python3 vault.py' /dev/null | tr -d '\\r' "
        "| grep -oE '[0-9a-f]{12}' | tail -1 > token.txt",
        files={"vault.py": program, ".sealed": sealed},
        expect={"token.txt": token},
        difficulty="hard",
    )


def wrapper(rng: random.Random) -> Made:
    key, value, name = some(rng, 3)
    return Made(
        f"/work/tool.sh reads the environment variable {key.upper()}. Write an executable script /work/{name}.sh that "
        f"runs it with {key.upper()}={value} and passes all its own arguments on, also those with spaces in them.",
        f"printf '#!/bin/bash\\n{key.upper()}={value} exec /bin/bash /work/tool.sh \"$@\"\\n' > {name}.sh\n"
        f"chmod +x {name}.sh",
        files={"tool.sh": f'#!/bin/bash\nprintf "%s|" "${key.upper()}" "$@"\n'},
        goals=[f"[ -x {name}.sh ] && [ \"$(./{name}.sh 'a b' c)\" = '{value}|a b|c|' ]"],
        difficulty="medium",
    )
