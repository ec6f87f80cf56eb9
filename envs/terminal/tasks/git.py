"""Families about git repositories."""

from __future__ import annotations

import random

from envs.terminal.tasks.family import Made, lines_of
from envs.terminal.tasks.words import PEOPLE, sentence, some

ME = (
    "git config --global user.name me; git config --global user.email me@example.org; "
    "git config --global init.defaultBranch main"
)
AT = "export GIT_AUTHOR_DATE='2026-01-01T00:00:00Z' GIT_COMMITTER_DATE='2026-01-01T00:00:00Z'"
IN = f"{ME}; {AT}; mkdir -p /work/repo; cd /work/repo"
START = f"{IN}; git init -q"


def commit(rng: random.Random) -> Made:
    words = some(rng, 4)
    message, listed = sentence(rng, 3), "\n".join(sorted(f"{word}.txt" for word in words))
    return Made(
        f"Make /work/repo a git repository and commit all its .txt files, and nothing else, with the message: "
        f"{message}",
        f"cd repo\ngit init -q\ngit add '*.txt'\ngit commit -qm '{message}'",
        files={**{f"repo/{word}.txt": sentence(rng) for word in words}, "repo/secret.key": "key"},
        setup=IN,
        goals=[
            f"[ \"$(git -C repo log --format=%s)\" = '{message}' ]",
            f"[ \"$(git -C repo ls-files | LC_ALL=C sort)\" = '{listed}' ]",
        ],
    )


def restore(rng: random.Random) -> Made:
    lost, *others = some(rng, 5)
    text = sentence(rng)
    steps = "; ".join(f"echo {word} > {word}.txt; git add .; git commit -qm 'add {word}'" for word in others)
    return Made(
        f"The file {lost}.txt of the git repository /work/repo was deleted in some commit. Bring it back with the "
        "content it had before, and commit it.",
        f"cd repo\ngit checkout -q $(git rev-list -1 HEAD -- {lost}.txt)^ -- {lost}.txt\n"
        f"git commit -qm 'restore {lost}'",
        setup=f"{START}; echo '{text}' > {lost}.txt; git add .; git commit -qm first; git rm -q {lost}.txt; "
        f"git commit -qm 'clean up'; {steps}",
        goals=[f"[ \"$(git -C repo show HEAD:{lost}.txt)\" = '{text}' ]"],
        guards=[f"[ \"$(git -C repo show HEAD:{word}.txt)\" = {word} ]" for word in others],
        difficulty="medium",
    )  # fmt: skip


def merge(rng: random.Random) -> Made:
    name, branch, left, right, both = some(rng, 5)
    return Made(
        f"In the git repository /work/repo merge the branch {branch} into main. {name}.txt conflicts: it must end up "
        f"with the lines {both}, {left}, {right}, in this order.",
        f"cd repo\ngit merge {branch} || true\nprintf '{both}\\n{left}\\n{right}\\n' > {name}.txt\ngit add .\n"
        "git commit -qm merged",
        setup=f"{START}; echo {both} > {name}.txt; git add .; git commit -qm first; git checkout -q -b {branch}; "
        f"echo {right} >> {name}.txt; git commit -qam right; git checkout -q main; echo {left} >> {name}.txt; "
        "git commit -qam left",
        goals=[
            f'[ "$(git -C repo show main:{name}.txt | xargs)" = "{both} {left} {right}" ]',
            f"git -C repo merge-base --is-ancestor {branch} main && "
            '[ "$(git -C repo log --format=%s main | grep -cxE "left|right")" = 2 ]',  # nor was either reset
        ],
        difficulty="hard",
    )


def first_bad(rng: random.Random) -> Made:
    count = rng.randrange(12, 24)
    bad = rng.randrange(3, count)
    word = some(rng, 1)[0]
    return Made(
        "In the git repository /work/repo `sh check.sh` succeeds at the first commit and fails at the last. Write the "
        "subject of the first commit at which it fails to /work/bad.txt.",
        "cd repo\nfor c in $(git rev-list --reverse HEAD); do git checkout -q $c; "
        "if ! sh check.sh; then git log -1 --format=%s > ../bad.txt; break; fi; done\ngit checkout -q main",
        setup=f"{START}; echo '! grep -q {word} data.txt' > check.sh; for i in $(seq {count}); do "
        f'if [ $i = {bad} ]; then echo {word} >> data.txt; else echo $i >> data.txt; fi; git add .; '
        'git commit -qm "step $i"; done',
        expect={"bad.txt": f"step {bad}"},
        difficulty="hard",
    )  # fmt: skip


def authors(rng: random.Random) -> Made:
    people = rng.sample(PEOPLE, 3)
    commits = [rng.choice(people) for _ in range(9)] + people
    rng.shuffle(commits)
    made = "; ".join(
        f"git commit -q --allow-empty -m {n} --author='{who} <a@example.org>'" for n, who in enumerate(commits)
    )
    counts = [f"{who} {commits.count(who)}" for who in sorted(people)]
    return Made(
        "Count the commits of each author in the git repository /work/repo. Write lines `author count`, sorted by "
        "author, to /work/authors.txt.",
        "git -C repo log --format=%an | sort | uniq -c | awk '{print $2, $1}' > authors.txt",
        setup=f"{START}; {made}",
        expect={"authors.txt": lines_of(counts)},
        difficulty="medium",
    )
