"""Families about files and folders: make, move, rename, remove, link, permit."""

from __future__ import annotations

import random

from envs.terminal.tasks.family import Made, lines_of, unchanged
from envs.terminal.tasks.words import sentence, some


def make_file(rng: random.Random) -> Made:
    folder, name, text = *some(rng, 2), sentence(rng, 3)
    return Made(
        f"Create the file /work/{folder}/{name}.txt. It must hold one line: {text}",
        f"mkdir -p {folder}\necho '{text}' > {folder}/{name}.txt",
        expect={f"{folder}/{name}.txt": text},
    )


def make_tree(rng: random.Random) -> Made:
    root, *parts = some(rng, 5)
    made = "".join(f"\n- /work/{root}/{part}/README.md with the one line: # {part}" for part in parts)
    return Made(
        f"Create these files, with their folders:{made}",
        f'for p in {" ".join(parts)}; do mkdir -p {root}/$p; echo "# $p" > {root}/$p/README.md; done',
        expect={f"{root}/{part}/README.md": f"# {part}" for part in parts},
    )


def sort_by_ending(rng: random.Random) -> Made:
    endings = rng.sample(["txt", "md", "csv", "log", "json", "cfg"], 3)
    files = {f"inbox/{word}.{rng.choice(endings)}": sentence(rng) for word in some(rng, 9)}
    placed = {f"sorted/{name.rpartition('.')[2]}/{name.partition('/')[2]}": text for name, text in files.items()}
    return Made(
        "Move every file of /work/inbox into /work/sorted/ENDING/, where ENDING is the file's ending without the dot "
        "(a.txt goes to /work/sorted/txt/a.txt). The inbox stays, empty.",
        "for f in inbox/*; do e=${f##*.}; mkdir -p sorted/$e; mv $f sorted/$e/; done",
        files=files,
        expect=placed,
        goals=['[ -d inbox ] && [ -z "$(ls -A inbox)" ]'],
        guards=[f"[ -f {old} ] || [ -f {new} ]" for old, new in zip(files, placed, strict=True)],
    )


def rename_numbers(rng: random.Random) -> Made:
    old, new = some(rng, 2)
    numbers = rng.sample(range(1, 400), 8)
    texts = {number: sentence(rng) for number in numbers}
    return Made(
        f"Rename every file {old}_N.txt in /work to {new}-NNN.txt, where NNN is its number N with leading zeros to "
        "three digits.",
        f'for f in {old}_*.txt; do n=${{f#{old}_}}; n=${{n%.txt}}; mv $f $(printf "{new}-%03d.txt" $n); done',
        files={f"{old}_{number}.txt": text for number, text in texts.items()},
        expect={f"{new}-{number:03d}.txt": text for number, text in texts.items()},
        goals=[f"! ls {old}_*.txt"],
        guards=[f"[ -f {old}_{number}.txt ] || [ -f {new}-{number:03d}.txt ]" for number in numbers],
        difficulty="medium",
    )


def remove_temporary(rng: random.Random) -> Made:
    folders = some(rng, 4)
    kept = folders[0]
    ending = rng.choice(["tmp", "bak", "swp"])
    names = [f"{folder}/{'deep/' * rng.randrange(2)}{word}" for folder in folders for word in some(rng, 3)]
    gone = [f"{name}.{ending}" for name in names if not name.startswith(f"{kept}/")]
    stay = [f"{name}.{ending}" for name in names if name.startswith(f"{kept}/")] + [f"{name}.txt" for name in names]
    return Made(
        f"Delete every file that ends in .{ending} below /work, at any depth, but none below /work/{kept}.",
        f"find . -name '*.{ending}' -not -path './{kept}/*' -delete",
        files={name: sentence(rng, 2) for name in (*gone, *stay)},
        goals=[f"! ls {' '.join(gone)} 2>/dev/null | grep -q ."],
        guards=[f"[ -f {name} ]" for name in stay],
        difficulty="medium",
    )


def largest_file(rng: random.Random) -> Made:
    words = some(rng, 10)
    sizes = rng.sample(range(100, 5000), 10)
    files = {
        f"data/{words[n % 3]}/{word}.bin": "x" * size for n, (word, size) in enumerate(zip(words, sizes, strict=True))
    }
    largest = max(files, key=lambda name: len(files[name]))
    return Made(
        "Find the largest file below /work/data. Write its path relative to /work (such as data/a/b.bin) to "
        "/work/answer.txt.",
        "find data -type f -printf '%s %p\\n' | sort -n | tail -1 | cut -d' ' -f2 > answer.txt",
        files=files,
        expect={"answer.txt": largest},
    )


def same_content(rng: random.Random) -> Made:
    words = some(rng, 12)
    texts = [sentence(rng, 8) for _ in range(10)]
    files = {f"notes/{word}.txt": f"{text}\n" for word, text in zip(words[:10], texts, strict=True)}
    files |= {f"notes/{word}.txt": f"{texts[4]}\n" for word in words[10:]}
    twins = sorted(name for name, text in files.items() if text == f"{texts[4]}\n")
    return Made(
        "Among the files in /work/notes, some have exactly the same content. Write their paths relative to /work "
        "(such as notes/a.txt), one a line and sorted, to /work/same.txt.",
        "sha256sum notes/* | sort | uniq -w64 -D | cut -c67- | sort > same.txt",
        files=files,
        expect={"same.txt": lines_of(twins)},
        difficulty="medium",
    )


def newest_version(rng: random.Random) -> Made:
    name = some(rng, 1)[0]
    versions = sorted({(rng.randrange(1, 4), rng.randrange(0, 15), rng.randrange(0, 12)) for _ in range(9)})
    folders = [f"releases/{name}-{'.'.join(map(str, version))}" for version in versions]
    return Made(
        f"/work/releases has a folder per version of {name}. Make /work/current a symbolic link to the folder of the "
        "highest version (numbers compare as numbers: 1.10.0 is above 1.9.0).",
        f"ln -s $(ls -d releases/{name}-* | sort -V | tail -1) current",
        files={f"{folder}/VERSION": folder for folder in folders},
        goals=[f'[ -L current ] && [ "$(readlink -f current)" = /work/{folders[-1]} ]'],
        guards=[f"[ -d {folder} ]" for folder in folders],
        difficulty="medium",
    )


def empty_folders(rng: random.Random) -> Made:
    words = some(rng, 10)
    full, empty = words[:5], words[5:]
    nested = f"{empty[0]}/{rng.choice(words)}/inner"
    return Made(
        "Delete every folder below /work/tree that holds no file at any depth. Keep all others.",
        "find tree -mindepth 1 -type d -empty -delete",
        files={f"tree/{word}/{word}.txt": sentence(rng) for word in full},
        setup=f"cd /work/tree; mkdir -p {' '.join(empty)} {nested}",
        goals=["[ -z \"$(find tree -mindepth 1 -type d -empty)\" ]", *(f"[ ! -e tree/{word} ]" for word in empty)],
        guards=[f"[ -f tree/{word}/{word}.txt ]" for word in full],
    )  # fmt: skip


def permissions(rng: random.Random) -> Made:
    scripts, secrets = some(rng, 3), some(rng, 2)
    return Made(
        "Make every .sh file in /work/bin executable by everybody (mode 755), and every file in /work/private readable "
        "and writable by its owner alone (mode 600).",
        "chmod 755 bin/*.sh\nchmod 600 private/*",
        files={
            **{f"bin/{name}.sh": f"#!/bin/sh\necho {name}\n" for name in scripts},
            "bin/README": "scripts\n",
            **{f"private/{name}.key": sentence(rng) for name in secrets},
        },
        setup="cd /work; chmod 644 bin/* private/*",
        goals=[
            *(f'[ "$(stat -c %a bin/{name}.sh)" = 755 ]' for name in scripts),
            *(f'[ "$(stat -c %a private/{name}.key)" = 600 ]' for name in secrets),
        ],
        guards=['[ "$(stat -c %a bin/README)" = 644 ]'],
    )


def world_writable(rng: random.Random) -> Made:
    words = some(rng, 9)
    names = [f"srv/{words[n % 2]}/{word}.dat" for n, word in enumerate(words)]
    loose = sorted(rng.sample(names, rng.randrange(2, 5)))
    return Made(
        "Some files below /work/srv can be written by everybody (others have write permission). Write their paths "
        "relative to /work, one a line and sorted, to /work/loose.txt, and take that permission of others away.",
        "find srv -type f -perm -o=w | LC_ALL=C sort > loose.txt\nxargs chmod o-w < loose.txt",
        files={name: sentence(rng) for name in names},
        setup=f"cd /work; chmod 644 {' '.join(names)}; chmod 666 {' '.join(loose)}",
        expect={"loose.txt": lines_of(loose)},
        goals=['[ -z "$(find srv -type f -perm -o=w)" ]'],
        guards=[f"[ -f {name} ]" for name in names],
        difficulty="medium",
    )


def copy_matching(rng: random.Random) -> Made:
    words = some(rng, 8)
    texts = {f"etc/{words[n % 3]}/{word}": sentence(rng) for n, word in enumerate(words)}
    picked = dict(list(texts.items())[::2])
    files = {f"{name}.conf" if name in picked else f"{name}.txt": text for name, text in texts.items()}
    return Made(
        "Copy every .conf file below /work/etc into /work/backup, each below the same folders as before "
        "(etc/a/b.conf is copied to backup/etc/a/b.conf). Copy nothing else.",
        "find etc -name '*.conf' | while read f; do mkdir -p backup/$(dirname $f); cp $f backup/$f; done",
        files=files,
        expect={f"backup/{name}.conf": text for name, text in picked.items()},
        goals=[f'[ "$(find backup -type f | wc -l)" = {len(picked)} ]'],
        guards=[unchanged(name, text) for name, text in files.items()],
        difficulty="medium",
    )
