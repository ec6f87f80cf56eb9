"""How the journal's actor groups appends and lets old turns go, on both databases, without Ray."""

import asyncio
import time

import pytest
from sqlalchemy import event
from test_journal import judgement, next_state, turn

from clawrl.journal import actor
from clawrl.journal.actor import Journal
from clawrl.types import Consent


@pytest.fixture
async def journal(url):
    opened = Journal(url)
    yield opened
    await opened.close()


async def test_32_concurrent_appends_share_commits(journal):
    """The first goes at once, the others gather behind its fsync."""
    commits = []
    event.listen(journal._store.database.writer, "commit", commits.append)
    await asyncio.gather(*(journal.append(turn(str(number))) for number in range(32)))
    assert (await journal.counts())["turns"] == 32
    assert len(commits) <= 3


async def test_old_turns_expire_while_appends_go_on(url, monkeypatch):
    monkeypatch.setattr(actor, "_EXPIRE_TURNS", 10)
    monkeypatch.setattr(actor, "_EXPIRE_S", 0.05)
    now = time.time()
    first = Journal(url)
    for number in range(45):
        id = str(number)
        await first.append(turn(id, ended=now - 3 * 86400), next_state(id), judgement(id))
    await first.close()
    journal = Journal(url, keep_days=2.0)
    try:
        await journal.append(turn("young", ended=now))
        async with asyncio.timeout(20):
            while (await journal.counts())["turns"] > 1:
                await journal.append(turn("side", kind="side", ended=now - 3 * 86400))
                await asyncio.sleep(0.02)
        assert await journal.turn("young") is not None
    finally:
        await journal.close()


async def test_a_mark_wakes_nobody_who_waits_for_words(journal, monkeypatch):
    reads = []
    consents = journal._store.consents
    monkeypatch.setattr(journal._store, "consents", lambda *asked: reads.append(asked) or consents(*asked))
    polling = asyncio.create_task(journal.consents(0, 10, 20))
    for number in range(3):
        await journal.append(Consent("ann", "s", False, 1.0, f"digest {number}"))
    assert (await journal.open_turn("ann", "digest 1")) == ("", "s", 0)
    assert len(reads) == 1
    await journal.consent("ann", False)
    assert [word.user for _, word in await polling] == ["ann"]


async def test_the_steps_of_a_group_come_with_what_followed_and_how_it_was_judged(journal):
    for id in ("first", "second", "last"):
        await journal.append(turn(id, group="g"))
    await journal.append(turn("side", group="g", kind="side"), turn("other", group="h"), turn("alone"))
    await journal.append(*(next_state(id) for id in ("first", "second", "side", "other", "alone")))
    await journal.append(judgement("second", score=-1))
    steps = [(state.turn, judged and judged.score) for state, judged in await journal.steps("g")]
    assert steps == [("first", None), ("second", -1)]
    assert await journal.pairs_to_judge(0, 10, 0) != []  # the turn that is in no group, and none of theirs
    assert {each.id for _, each, _ in await journal.pairs_to_judge(0, 10, 0)} == {"alone"}
