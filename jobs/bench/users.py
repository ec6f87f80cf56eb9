"""Many people, each with a policy of their own, in one engine: what a reply and the memory cost against one person.

    each user: question ─► reply ─► thumb down, correction ─► sample ─► a version of theirs ─► served to them alone

Then replies are asked for by one user again and again, and by many in turn, side by side: an adapter that nobody asked
for lately is not in the engine's memory and comes from the disk. Batches are of one sample here, so that each user has
a version soon, and no session is held out, since such never train.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import aiohttp

from clawrl.config import Config, LoraSection
from clawrl.errors import ClawrlError
from clawrl.journal.store import JournalReader
from clawrl.main import System, journal_url
from jobs.bench import client, processes
from jobs.bench.figures import Figure, Stream, median_ratio, percentile, throughput

TALKING = 8
"""Users who talk at the same time while they get their versions."""
REPLY_TOKENS = 64
PATIENCE_S = 20.0
"""A user's version, in the mean, may take so long."""
QUESTION = "I have {} apples and buy 3 more. How many do I have?"
CORRECTION = "That is too formal for me. Please say it more casually."


def measure(config: Config, *, users: int, rounds: int, num_tokens: int) -> tuple[list[Figure], dict[str, Any]]:
    """Raises ClawrlError if not every user has a version in time, or a reply fails."""
    lora = config.lora or LoraSection()
    scope = "user" if lora.policy_scope == "group" else lora.policy_scope
    config = config.model_copy(
        update={
            "run": "new",
            "lora": lora.model_copy(update={"policy_scope": scope}),
            "buffer": config.buffer.model_copy(update={"batch_size": 1, "min_batch": None}),
            "gate": config.gate.model_copy(update={"held_out_share": 0.0}),
        }
    )
    system = System.start(config, _say)
    try:
        journal = JournalReader(journal_url(config, system.run_directory))
        return asyncio.run(_measured(system.url, journal, [f"user-{n}" for n in range(users)], rounds, num_tokens))
    finally:
        system.stop()


async def _measured(
    url: str, journal: JournalReader, users: Sequence[str], rounds: int, num_tokens: int
) -> tuple[list[Figure], dict[str, Any]]:
    async with client.session() as http:
        await _teach(http, url, journal, users[:1])
        before = processes.memory()[0]
        await _teach(http, url, journal, users[1:])
        after = processes.memory()[0]
        _say(f"asking, {rounds} rounds")
        alone, among = await _in_turn(http, url, users, rounds, num_tokens)
        together = await _side_by_side(http, url, users, rounds, num_tokens)
    versions = Counter(version.scope for version in journal.versions() if version.scope)
    waited = _waited(journal)
    one, many = ([each.first - each.started for each in streams] for streams in (alone, among))
    figures = [
        Figure("users with a version of their own", len(versions)),
        Figure("versions of a user, fewest", min(versions.values())),
        Figure("versions of a user, most", max(versions.values())),
        Figure("from a user's sample to their version, median", percentile(waited, 0.5), "s"),
        Figure("the same, p95", percentile(waited, 0.95), "s"),
        Figure("first token, one user, median", 1000 * percentile(one, 0.5), "ms"),
        Figure("first token, each time another user, median", 1000 * percentile(many, 0.5), "ms"),
        Figure("the same, p95", 1000 * percentile(many, 0.95), "ms"),
        Figure("first token, another user / one user", median_ratio(many, one)),
        Figure("tokens/s of 16 streams, 16 users / one user", median_ratio(together["many"], together["one"])),
        Figure("memory of the whole system, all users / one user", sum(after.values()) / sum(before.values())),
        Figure("memory of the engine's replica per user", _per_user(before, after, "policy", len(users)), "MB"),
        Figure("memory of the weight store per user", _per_user(before, after, "WeightStore", len(users)), "MB"),
    ]
    return figures, {"one_s": one, "many_s": many, "together": together, "before": before, "after": after}


async def _teach(http: aiohttp.ClientSession, url: str, journal: JournalReader, users: Sequence[str]) -> None:
    """Let each of them say that a reply was not what they wanted, and wait until all are served by what came of it."""
    left, places = set(users), asyncio.Semaphore(TALKING)

    async def talk(user: str, number: int) -> None:
        async with places:
            messages = [{"role": "user", "content": QUESTION.format(number + 2)}]
            id, reply = await client.reply(http, url, messages, user=user, max_tokens=REPLY_TOKENS)
            async with http.post(f"{url}/feedback", json={"response_id": id, "user": user, "score": -1}) as response:
                response.raise_for_status()
            said = {"role": "user", "content": CORRECTION}
            talk_on = [*messages, {"role": "assistant", "content": reply}, said]
            await client.reply(http, url, talk_on, user=user, max_tokens=REPLY_TOKENS)

    deadline = time.monotonic() + PATIENCE_S * (len(users) + 5)
    talking = asyncio.gather(*(talk(user, number) for number, user in enumerate(users)))
    while left:
        swapped = {swap.version for swap in journal.swaps()}
        left -= {version.scope for version in journal.versions() if version.number in swapped}
        if time.monotonic() > deadline:
            raise ClawrlError(
                f"{len(left)} of {len(users)} users have no version of their own after {PATIENCE_S:g} s each"
            )
        _say(f"{len(users) - len(left)} of {len(users)} users have a version of their own")
        await asyncio.sleep(2)
    await talking


async def _in_turn(
    http: aiohttp.ClientSession, url: str, users: Sequence[str], rounds: int, num_tokens: int
) -> tuple[list[Stream], list[Stream]]:
    """One reply to the same user and one to another each time, so often that all had one."""
    alone, among = [], []
    for number in range(max(rounds, len(users))):
        for found, user in ((alone, users[0]), (among, users[number % len(users)])):
            found.append(_whole(await client.stream(http, url, _asked(number), num_tokens, user=user)))
    return alone, among


async def _side_by_side(
    http: aiohttp.ClientSession, url: str, users: Sequence[str], rounds: int, num_tokens: int
) -> dict[str, list[float]]:
    """Tokens/s of 16 streams at a time, of one user and of 16, in turn."""
    found: dict[str, list[float]] = {"one": [], "many": []}
    for number in range(rounds):
        several = [users[(16 * number + each) % len(users)] for each in range(16)]
        for name, asking in (("one", [users[0]] * 16), ("many", several)):
            streams = await asyncio.gather(
                *(client.stream(http, url, _asked(at), num_tokens, user=user) for at, user in enumerate(asking))
            )
            found[name].append(throughput([_whole(each) for each in streams]))
    return found


def _asked(number: int) -> client.Conversation:
    return [{"role": "user", "content": QUESTION.format(number)}]


def _whole(stream: Stream) -> Stream:
    if stream.error is not None:
        raise ClawrlError(f"a reply failed: {stream.error}")
    return stream


def _waited(journal: JournalReader) -> list[float]:
    """Seconds from a judgement, with which its sample is stored, to the version that learnt from it."""
    judged = {turn.id: judgement.at for _, turn, judgement in journal.judged_turns(0, 100_000)}
    return [version.at - judged[id] for version in journal.versions() for id in version.samples if id in judged]


def _per_user(before: dict[str, int], after: dict[str, int], part: str, users: int) -> float:
    return (after.get(part, 0) - before.get(part, 0)) / 1e6 / max(1, users - 1)


def _say(line: str) -> None:
    print(f"bench: {line}", flush=True)
