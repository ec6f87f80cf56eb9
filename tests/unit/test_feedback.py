"""Explicit feedback from the route to the journal: whose, of what, once; and what it does to what was judged."""

from contextlib import closing
from dataclasses import replace

import pytest
from echo_door import Door, door
from test_journal import judgement, next_state, sample, turn

from clawrl.errors import GatewayError
from clawrl.journal.store import JournalStore
from clawrl.rollout.collector import with_corrections, with_score
from clawrl.serving.feedback import read_opinion
from clawrl.serving.keys import add_key
from clawrl.types import Consent, Feedback

THUMB = Feedback("f", "t", "ann", 1, None, 4.0)


async def post(clawrl: Door, body: dict, **headers: str):
    async with clawrl.client(0, **headers) as client:
        return await client.post("/v1/feedback", json=body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "name one of turn, response_id and session"),
        ({"turn": "t", "session": "s", "score": 1}, "name one of"),
        ({"turn": "t"}, "give a score of -1, 0 or 1, a text, or both"),
        ({"turn": "t", "score": 2}, "score=2 is none of"),
        ({"turn": "t", "score": True}, "score=True is none of"),
        ({"turn": "t", "score": 0.5}, "score=0.5 is none of"),
        ({"turn": "t", "text": " "}, "text must be words"),
        ({"turn": "t", "text": ["x"]}, "text must be words"),
        ({"turn": "t", "text": "\ud83d"}, "half a surrogate"),
        ({"turn": 7, "score": 1}, "turn=7 is no id"),
        ({"turn": "t", "score": 1, "stars": 5}, "stars is not known here; use turn"),
    ],
)
def test_what_is_no_opinion_is_refused(body, message):
    with pytest.raises(GatewayError, match=message) as caught:
        read_opinion(body)
    assert caught.value.status == 400


async def test_of_a_turn_by_its_id_or_of_a_session_s_last(tmp_path):
    async with door(tmp_path) as clawrl:
        talk = [{"role": "user", "content": "hi"}]
        await clawrl.say(talk, x_session_id="s")
        talk.append({"role": "user", "content": "more"})
        await clawrl.say(talk, x_session_id="s")
        first, last = (id for (id,) in clawrl.rows("SELECT id FROM turns"))
        answers = [
            await post(clawrl, {"turn": first, "score": 1, "user": "ann"}),
            await post(clawrl, {"response_id": first, "score": -1, "user": "ann"}),
            await post(clawrl, {"session": "s", "text": "in metres, please", "user": "ann"}),
        ]
        assert [answer.status_code for answer in answers] == [200] * 3, [answer.text for answer in answers]
        assert [answer.json()["turn"] for answer in answers] == [first, first, last]
        rows = clawrl.rows("SELECT turn, user, score, text FROM feedback")
        assert rows == [(first, "ann", 1, None), (first, "ann", -1, None), (last, "ann", None, "in metres, please")]


async def test_the_same_again_is_one_and_a_change_of_mind_is_not(tmp_path):
    async with door(tmp_path) as clawrl:
        await clawrl.say([{"role": "user", "content": "hi"}], x_session_id="s")
        ids = [
            (await post(clawrl, {"session": "s", "score": score, "user": "ann"})).json()["id"]
            for score in (1, 1, -1, 1, 1)
        ]
        assert ids[0] == ids[1]
        assert ids[3] == ids[4]
        assert clawrl.rows("SELECT score FROM feedback") == [(1,), (-1,), (1,)]


async def test_what_is_not_there_or_another_s_is_404(tmp_path):
    async with door(tmp_path) as clawrl:
        annas, bobs = (add_key(tmp_path / "keys.json", user)[1] for user in ("ann", "bob"))
        await clawrl.say([{"role": "user", "content": "hi"}], x_session_id="s", authorization=f"Bearer {annas}")
        [(id,)] = clawrl.rows("SELECT id FROM turns")
        for target in ({"turn": id}, {"session": "s"}, {"turn": "nothing"}):
            refused = await post(clawrl, {**target, "score": 1, "user": "ann"}, authorization=f"Bearer {bobs}")
            assert refused.status_code == 404, target
        assert (await post(clawrl, {"turn": id, "score": 1})).status_code == 401
        assert (await post(clawrl, {"turn": id, "score": 1}, authorization=f"Bearer {annas}")).status_code == 200


async def test_secrets_in_a_correction_are_not_written(tmp_path):
    async with door(tmp_path) as clawrl:
        await clawrl.say([{"role": "user", "content": "hi"}], x_session_id="s")
        key = "AKIA" + "IOSFODNN7EXAMPLE"
        assert (await post(clawrl, {"session": "s", "text": f"use {key}", "user": "ann"})).status_code == 200
        assert key.encode() not in clawrl.files()
        assert len(clawrl.rows("SELECT id FROM feedback")) == 1


@pytest.fixture
def store(url):
    with closing(JournalStore(url)) as opened:
        yield opened


def take(store, **changed) -> tuple[str, bool]:
    taken: list = []
    store.write(store.taking_feedback(replace(THUMB, **changed), taken))
    return taken[-1]


def test_a_turn_judged_without_a_sample_is_judged_again(store):
    for id in ("t", "u"):
        store.append(turn(id), next_state(id), judgement(id, score=None))
    after = max(seq for seq, _, _ in store.judged_turns(0, 10))
    assert store.pairs_to_judge(0, 10) == []
    assert take(store) == ("f", True)
    [(seq, found, _)] = store.pairs_to_judge(2, 10)
    assert (found.id, seq) == ("t", 3), "behind whoever reads in order"
    store.append(judgement("t", score=1), sample("t"))
    assert [found.id for _, found, _ in store.judged_turns(after, 10)] == ["t"]
    assert take(store, id="g", score=-1) == ("g", False), "its sample may be trained on by now"
    assert store.pairs_to_judge(0, 10) == []


def test_a_withdrawn_turn_takes_no_feedback(store):
    store.append(turn("t"), next_state("t"), judgement("t", score=None))
    store.consent(Consent("ann", None, False, 5.0))
    assert take(store) == ("f", False)
    assert store.feedback("t") == []


def test_turns_are_found_by_their_latest_explicit_score(store):
    store.append(*(turn(id) for id in "abcdef"), turn("s", kind="side"), turn("w", user="bob"), judgement("a"))
    scores = (("b", 1), ("a", 1), ("a", -1), ("c", 1), ("c", 0), ("d", 0), ("s", -1), ("w", 1), ("gone", 1))
    store.append(*(replace(THUMB, id=f"{id} {score}", turn=id, score=score) for id, score in scores))
    store.append(*(replace(THUMB, id=f"{id} words", turn=id, score=None, text="too long") for id in "be"))
    store.consent(Consent("bob", None, False, 20.0))
    found = store.scored_turns(0, 10)
    assert [(each.id, score) for _, each, score in found] == [("a", -1), ("b", 1), ("s", -1)]
    assert [each.id for _, each, _ in store.scored_turns(0, 2)] == ["a", "b"]
    assert [each.id for _, each, _ in store.scored_turns(found[1][0], 10)] == ["s"]
    assert found[0][1].capture.completion_ids.tolist() == [7, 9]


def test_turns_that_nothing_followed_are_found_once_their_time_has_come(store):
    for id in ("t", "u", "v"):
        store.append(turn(id))
    store.append(turn("s", kind="side"), next_state("u"))
    for at, id in enumerate("tusv"):
        take(store, id=f"of {id}", turn=id, at=float(at))
    assert store.unanswered_feedback(0, 2.5, 10) == (3, ["t"])
    assert store.unanswered_feedback(3, 2.5, 10) == (3, [])
    assert store.unanswered_feedback(3, 3.0, 10) == (4, ["v"])
    assert store.counts()["feedback"] == 4


def test_the_latest_score_stands_above_the_votes():
    said = [THUMB, replace(THUMB, text="no", score=None), replace(THUMB, score=-1)]
    judged = with_score(judgement("t", score=1), said)
    assert (judged.score, judged.votes) == (-1, (1, None, -1))
    assert with_score(judgement("t", score=None), said[1:2]).score is None


def test_corrections_are_read_before_what_followed():
    followed = next_state("t")
    read = with_corrections(followed, [THUMB, replace(THUMB, text="in metres", score=None)])
    assert [message["content"] for message in read.messages] == ["in metres", "1", "2"]
    assert (read.role, with_corrections(followed, [THUMB])) == ("user", followed)
