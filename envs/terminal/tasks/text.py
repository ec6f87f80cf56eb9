"""Families about text: count, sort, search, replace, cut, join."""

from __future__ import annotations

import random
from collections import Counter

from envs.terminal.tasks.family import Made, lines_of, unchanged
from envs.terminal.tasks.words import PEOPLE, sentence, some

LEVELS = ("DEBUG", "INFO", "WARN", "ERROR")


def count_level(rng: random.Random) -> Made:
    level = rng.choice(LEVELS)
    logged = [f"{rng.choice(LEVELS)} {sentence(rng, 4)}" for _ in range(rng.randrange(40, 90))] + [f"{level} end"]
    count = sum(line.startswith(f"{level} ") for line in logged)
    return Made(
        f"How many lines of /work/app.log begin with {level}? Write the number to /work/count.txt.",
        f"grep -c '^{level} ' app.log > count.txt",
        files={"app.log": lines_of(logged)},
        expect={"count.txt": f"{count}"},
    )


def most_frequent(rng: random.Random) -> Made:
    hosts = [f"10.{rng.randrange(256)}.{rng.randrange(256)}.{rng.randrange(1, 255)}" for _ in range(6)]
    top = rng.choice(hosts)
    seen = [rng.choice(hosts) for _ in range(60)] + [top] * 40
    rng.shuffle(seen)
    return Made(
        "Each line of /work/access.log begins with the address of a client. Write the address with the most lines to "
        "/work/top.txt.",
        "cut -d' ' -f1 access.log | sort | uniq -c | sort -n | tail -1 | awk '{print $2}' > top.txt",
        files={"access.log": lines_of([f"{host} GET /{rng.choice(some(rng, 3))} 200" for host in seen])},
        expect={"top.txt": top},
    )


def sorted_unique(rng: random.Random) -> Made:
    names = [rng.choice(PEOPLE) for _ in range(40)]
    return Made(
        "Write every name in /work/names.txt once, in alphabetical order, one a line, to /work/unique.txt.",
        "sort -u names.txt > unique.txt",
        files={"names.txt": lines_of(names)},
        expect={"unique.txt": lines_of(sorted(set(names)))},
    )


def replace_word(rng: random.Random) -> Made:
    old, new, *names = some(rng, 7)
    texts = {f"docs/{name}.md": f"{sentence(rng)} {old} {sentence(rng)}\n{old}s and {old}\n" for name in names}
    return Made(
        f"In every .md file in /work/docs replace the whole word {old} by {new}. Longer words that contain it, such as "
        f"{old}s, stay as they are.",
        f"sed -i 's/\\b{old}\\b/{new}/g' docs/*.md",
        files=texts,
        expect={
            name: "\n".join(" ".join(new if w == old else w for w in line.split(" ")) for line in text.split("\n"))
            for name, text in texts.items()
        },
        difficulty="medium",
    )


def cut_column(rng: random.Random) -> Made:
    rows = [
        (name.lower(), rng.randrange(1000, 9999), rng.choice(["sh", "bash", "zsh"])) for name in rng.sample(PEOPLE, 9)
    ]
    shell = rng.choice(rows)[2]
    found = sorted(name for name, _, used in rows if used == shell)
    return Made(
        f"The lines of /work/users.txt are name:number:shell. Write the names of all users whose shell is {shell}, "
        "sorted, one a line, to /work/found.txt.",
        f"awk -F: '$3 == \"{shell}\" {{print $1}}' users.txt | sort > found.txt",
        files={"users.txt": lines_of([":".join(map(str, row)) for row in rows])},
        expect={"found.txt": lines_of(found)},
    )  # fmt: skip


def join_tables(rng: random.Random) -> Made:
    ids = rng.sample(range(100, 999), 10)
    people = dict(zip(ids, rng.sample(PEOPLE, 10), strict=True))
    orders = dict(zip(rng.sample(ids, 6), some(rng, 6), strict=True))
    joined = [f"{number} {people[number]} {orders[number]}" for number in sorted(orders)]
    return Made(
        "The lines of /work/people.txt are `id name`, those of /work/orders.txt are `id item`. For every id that is in "
        "both write `id name item`, sorted by id, to /work/joined.txt.",
        "join <(sort people.txt) <(sort orders.txt) > joined.txt",
        files={
            "people.txt": lines_of([f"{number} {name}" for number, name in people.items()]),
            "orders.txt": lines_of([f"{number} {item}" for number, item in orders.items()]),
        },
        expect={"joined.txt": lines_of(joined)},
        difficulty="medium",
    )


def line_ends(rng: random.Random) -> Made:
    names = some(rng, 6)
    texts = {f"src/{name}.txt": lines_of([sentence(rng) for _ in range(4)]) for name in names}
    windows = names[: rng.randrange(2, 5)]
    return Made(
        "Some files in /work/src have Windows line ends (CR LF). Give those Unix line ends (LF), and change nothing "
        "else. Write how many files you had to change to /work/changed.txt.",
        "grep -l $'\\r' src/* > /tmp/list\nwc -l < /tmp/list > changed.txt\nxargs sed -i 's/\\r$//' < /tmp/list",
        files={
            name: text.replace("\n", "\r\n") if name[4:-4] in windows else text for name, text in texts.items()
        },
        expect={"changed.txt": f"{len(windows)}"},
        goals=[f"({unchanged(f'src/{name}.txt', texts[f'src/{name}.txt'])})" for name in windows],
        guards=[unchanged(f"src/{name}.txt", texts[f"src/{name}.txt"]) for name in names if name not in windows],
        difficulty="medium",
    )  # fmt: skip


def find_definition(rng: random.Random) -> Made:
    words = some(rng, 8)
    name = f"{words[0]}_{words[1]}"
    files: dict[str, str] = {}
    where = rng.randrange(6)
    for number, word in enumerate(words[2:]):
        body = [f"# {word} calls {name} somewhere", ""] + [f"x{n} = {n}" for n in range(rng.randrange(2, 20))]
        body.append(f"def {name}(a, b):" if number == where else f"value = {name}(1, 2)")
        files[f"lib/{word}.py"] = lines_of([*body, "    return a + b" if number == where else "print(value)"])
    home = f"lib/{words[2:][where]}.py"
    line = files[home].split("\n").index(f"def {name}(a, b):") + 1
    return Made(
        f"Where below /work/lib is the Python function {name} defined? Write PATH:LINE to /work/where.txt, the path "
        "relative to /work, such as lib/a.py:12.",
        f"grep -rn '^def {name}(' lib | cut -d: -f1,2 > where.txt",
        files=files,
        expect={"where.txt": f"{home}:{line}"},
    )


def time_window(rng: random.Random) -> Made:
    minutes = sorted(rng.sample(range(24 * 60), 80))
    logged = [f"{minute // 60:02d}:{minute % 60:02d} {sentence(rng, 3)}" for minute in minutes]
    first, last = sorted(rng.sample(range(6, 20), 2))
    inside = [line for line in logged if f"{first:02d}:00" <= line[:5] < f"{last:02d}:00"]
    return Made(
        f"Each line of /work/day.log begins with a time HH:MM. Write all lines from {first:02d}:00 (included) to "
        f"{last:02d}:00 (not included), as they are and in order, to /work/part.log.",
        f'awk \'$1 >= "{first:02d}:00" && $1 < "{last:02d}:00"\' day.log > part.log',
        files={"day.log": lines_of(logged)},
        expect={"part.log": lines_of(inside)},
        difficulty="medium",
    )


def fill_template(rng: random.Random) -> Made:
    keys = [word.upper() for word in some(rng, 4)]
    values = dict(zip(keys, some(rng, 4), strict=True))
    lines = [f"{key.lower()} is {{{{{key}}}}} and {sentence(rng, 2)}" for key in rng.choices(keys, k=6)]
    filled = lines_of(lines)
    for key, value in values.items():
        filled = filled.replace(f"{{{{{key}}}}}", value)
    return Made(
        "Fill in /work/letter.tpl: replace every {{KEY}} by the value of KEY in /work/values.env (lines KEY=value). "
        "Write the outcome to /work/letter.txt.",
        "cp letter.tpl letter.txt\nwhile IFS== read k v; do sed -i \"s/{{$k}}/$v/g\" letter.txt; done < values.env",
        files={"letter.tpl": lines_of(lines), "values.env": lines_of([f"{k}={v}" for k, v in values.items()])},
        expect={"letter.txt": filled},
        difficulty="medium",
    )  # fmt: skip


def sum_column(rng: random.Random) -> Made:
    rows = [(rng.choice(PEOPLE), rng.randrange(1, 500)) for _ in range(30)]
    who = rng.choice(rows)[0]
    total = sum(amount for name, amount in rows if name == who)
    return Made(
        f"The lines of /work/paid.txt are `name amount`. Write the sum of all amounts of {who} to /work/sum.txt.",
        f"awk '$1 == \"{who}\" {{s += $2}} END {{print s}}' paid.txt > sum.txt",
        files={"paid.txt": lines_of([f"{name} {amount}" for name, amount in rows])},
        expect={"sum.txt": f"{total}"},
    )


def word_counts(rng: random.Random) -> Made:
    words = [rng.choice(some(rng, 12)) for _ in range(150)]
    lines = [" ".join(rng.choice((word, word.title(), f"{word},", f"{word}.")) for word in words[n : n + 10])
             for n in range(0, 150, 10)]  # fmt: skip
    count = rng.randrange(3, 6)
    best = sorted(Counter(words).items(), key=lambda each: (-each[1], each[0]))[:count]
    return Made(
        f"Count the words of /work/story.txt, without regard to case and punctuation. Write the {count} most frequent "
        "as lines `word count` to /work/words.txt, words in lower case, the most frequent first; words with the same "
        "count in alphabetical order.",
        "tr 'A-Z' 'a-z' < story.txt | grep -oE '[a-z]+' | sort | uniq -c | awk '{print $2, $1}' "
        f"| LC_ALL=C sort -k2,2nr -k1,1 | head -{count} > words.txt",
        files={"story.txt": lines_of(lines)},
        expect={"words.txt": lines_of([f"{word} {number}" for word, number in best])},
        difficulty="hard",
    )
