"""Families about CSV, JSON, INI and SQLite."""

from __future__ import annotations

import json
import random

from envs.terminal.tasks.family import Made, lines_of, unchanged
from envs.terminal.tasks.words import CITIES, PEOPLE, some


def csv_totals(rng: random.Random) -> Made:
    cities = rng.sample(CITIES, 5)
    rows = [(rng.choice(PEOPLE), rng.choice(cities), rng.randrange(1, 300)) for _ in range(40)]
    totals: dict[str, int] = {}
    for _, city, amount in rows:
        totals[city] = totals.get(city, 0) + amount
    return Made(
        "/work/sales.csv has the columns name,city,amount. Write /work/totals.csv with the header city,total and a row "
        "per city with the sum of its amounts, sorted by city.",
        "(echo city,total; tail -n +2 sales.csv | awk -F, '{s[$2] += $3} END {for (c in s) print c \",\" s[c]}' "
        "| LC_ALL=C sort) > totals.csv",
        files={"sales.csv": lines_of(["name,city,amount", *(",".join(map(str, row)) for row in rows)])},
        expect={"totals.csv": lines_of(["city,total", *(f"{city},{totals[city]}" for city in sorted(totals))])},
        difficulty="medium",
    )


def json_query(rng: random.Random) -> Made:
    limit = rng.randrange(25, 60)
    people = [
        {"name": name, "age": rng.randrange(18, 80), "city": rng.choice(CITIES)} for name in rng.sample(PEOPLE, 12)
    ]
    older = sorted(each["name"] for each in people if each["age"] > limit)
    return Made(
        f"/work/people.json is a list of objects with name, age and city. Write the names of all who are older than "
        f"{limit}, sorted, one a line, to /work/older.txt.",
        "python3 -c \"import json\nfor n in sorted(p['name'] for p in json.load(open('people.json')) "
        f"if p['age'] > {limit}): print(n)\" > older.txt",
        files={"people.json": json.dumps(people, indent=1)},
        expect={"older.txt": lines_of(older)},
        difficulty="medium",
    )  # fmt: skip


def json_overlay(rng: random.Random) -> Made:
    a, b, c, d, e = some(rng, 5)
    base = {a: {b: rng.randrange(100), c: "old"}, d: [1, 2, 3]}
    above = {a: {c: f"new {rng.randrange(100)}"}, e: {"on": True}}
    merged = {a: {**base[a], **above[a]}, d: [1, 2, 3], e: {"on": True}}  # type: ignore[dict-item]
    check = f"import json; assert json.load(open('/work/merged.json')) == {merged!r}"
    return Made(
        "Merge /work/base.json and /work/above.json into /work/merged.json: objects are merged key by key at every "
        "depth; for anything else the value of above.json wins.",
        "python3 - <<'E'\nimport json\ndef m(a, b):\n"
        "    return {**a, **{k: m(a[k], v) if k in a else v for k, v in b.items()}} "
        "if isinstance(a, dict) and isinstance(b, dict) else b\n"
        "json.dump(m(json.load(open('base.json')), json.load(open('above.json'))), open('merged.json', 'w'))\nE",
        files={"base.json": json.dumps(base), "above.json": json.dumps(above)},
        goals=[f'python3 -I -c "{check}"'],
        difficulty="medium",
    )


def csv_to_json(rng: random.Random) -> Made:
    rows = [(name, rng.randrange(18, 80)) for name in rng.sample(PEOPLE, 7)]
    wanted = [{"name": name, "age": age} for name, age in rows]
    return Made(
        "Turn /work/people.csv (columns name,age) into /work/people.json: a list of objects with name (a string) and "
        "age (a number), in the same order.",
        "python3 -c \"import csv, json; json.dump([{'name': r['name'], 'age': int(r['age'])} "
        "for r in csv.DictReader(open('people.csv'))], open('people.json', 'w'))\"",
        files={"people.csv": lines_of(["name,age", *(f"{name},{age}" for name, age in rows)])},
        goals=[f"python3 -I -c \"import json; assert json.load(open('/work/people.json')) == {wanted!r}\""],
        difficulty="medium",
    )


def ini_edit(rng: random.Random) -> Made:
    sections = some(rng, 3)
    port, new = rng.sample(range(1024, 9999), 2)
    text = lines_of([line for name in sections for line in (f"[{name}]", "host = localhost", f"port = {port}", "")])
    section = rng.choice(sections)
    parts = text.split(f"[{section}]")
    return Made(
        f"In /work/app.ini set port to {new} in section [{section}]. Everything else stays as it is.",
        f"sed -i '/^\\[{section}\\]/,/^port/ s/^port = .*/port = {new}/' app.ini",
        files={"app.ini": text},
        expect={"app.ini": f"{parts[0]}[{section}]{parts[1].replace(str(port), str(new), 1)}"},
    )


def sqlite_query(rng: random.Random) -> Made:
    rows = [(name, rng.choice(CITIES[:5]), rng.randrange(10, 999)) for name in rng.sample(PEOPLE, 15)]
    city = rng.choice(rows)[1]
    best = max((row for row in rows if row[1] == city), key=lambda row: (row[2], row[0]))
    script = (
        "import sqlite3\nd = sqlite3.connect('/work/shop.db')\nd.execute('create table customers(name, city, spent)')\n"
        f"d.executemany('insert into customers values (?,?,?)', {rows!r})\nd.commit()\n"
    )
    return Made(
        f"The SQLite database /work/shop.db has a table customers(name, city, spent). Who of {city} spent the most (of "
        "several, the last by name)? Write the name to /work/best.txt. There is no sqlite3 program; Python has a "
        "module.",
        "python3 -c \"import sqlite3; print(sqlite3.connect('shop.db').execute(\\\"select name from customers where "
        f"city = '{city}' order by spent desc, name desc\\\").fetchone()[0])\" > best.txt",
        setup=f"python3 - <<'E'\n{script}E",
        expect={"best.txt": best[0]},
        difficulty="hard",
    )


def repair_jsonl(rng: random.Random) -> Made:
    good = [json.dumps({"id": number, "word": word}) for number, word in enumerate(some(rng, 10))]
    lines = good + rng.choices(good, k=4) + [each[: rng.randrange(2, len(each) - 1)] for each in rng.sample(good, 3)]
    rng.shuffle(lines)
    kept = sorted(set(lines) & set(good), key=lambda each: json.loads(each)["id"])
    return Made(
        "Some lines of /work/events.jsonl are not valid JSON, some are there twice. Write the valid ones to "
        "/work/clean.jsonl, each once, as they are, sorted by their id as a number.",
        "python3 - > clean.jsonl <<'E'\nimport json\nk = {}\nfor l in open('events.jsonl'):\n    try:\n"
        "        k[json.loads(l)['id']] = l\n    except ValueError:\n        pass\nfor i in sorted(k): "
        "print(k[i], end='')\nE",
        files={"events.jsonl": lines_of(lines)},
        expect={"clean.jsonl": lines_of(kept)},
        guards=[unchanged("events.jsonl", lines_of(lines))],
        difficulty="hard",
    )
