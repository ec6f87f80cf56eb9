"""The report: intervals, who was served by which version, stalls, the verdict, and the files it leaves."""

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest

from clawrl.types import Swap, VersionEvent, WeightVersion
from envs.chat.conversation import Evaluation
from envs.chat.user import Persona
from jobs import demo, report
from jobs.report import Evidence, FirstReply, Stream
from jobs.suite import SuiteResult

PROMISED = {
    "score_before", "score_after", "correct_before", "correct_after", "turns", "judgements", "hints", "versions",
    "swaps", "requests_failed", "longest_stall_ms", "seconds", "method", "seed",
}  # fmt: skip
COUNTS = {"main_turns": 50, "judgements": 40, "abstentions": 2, "hints": 11, "samples": 38, "consumed": 32}


def evaluation(score: float, correct: float, persona: Persona = "student") -> Evaluation:
    return Evaluation(
        persona=persona,
        num_replies=200,
        score=score,
        correct=correct,
        shows_work=0.5,
        sound=0.5,
        good=0.1,
        mean_length=30.0,
        forms={"plain": score},
        num_failed=0,
        ids=(),
    )


def version(number: int, at: float) -> WeightVersion:
    metrics = {"loss": 0.5 / number, "lag_mean": 1.0}
    return WeightVersion(number, number - 1, "full", None, ("a", "b"), metrics, at)


def swap(number: int, at: float, stall_ms: float = 40.0) -> Swap:
    return Swap(number, "replica", stall_ms, 1e-5, 0.1, at)


def first_reply(at: float, satisfied: bool, sound: bool = True, persona: str = "student") -> FirstReply:
    return FirstReply(at, satisfied, True, sound, 30, persona)


def evidence(**changes) -> Evidence:
    """Two versions, at 20 s and 30 s; four conversations before, between and after their swaps."""
    replies = [(1012.0, False), (1018.0, False), (1025.0, True), (1035.0, True)]
    full = Evidence(
        method="hybrid",
        model="clawrl:tiny",
        persona="student",
        seed=3,
        run_directory="/runs/x",
        started=1000.0,
        serving=1010.0,
        ended=1060.0,
        before=(evaluation(0.2, 0.82),),
        after=(evaluation(0.9, 0.80),),
        suite_before=SuiteResult({"judge": 0.9, "drill": 0.7}, 80, 0),
        suite_after=SuiteResult({"judge": 0.8, "drill": 0.6}, 80, 0),
        divergence=0.12,
        first_replies=tuple(first_reply(at, satisfied) for at, satisfied in replies),
        streams=(Stream(1019.0, 1021.0, 0.12), Stream(1024.0, 1026.0, 0.3), Stream(1029.8, 1031.0, 0.07)),
        versions=(version(1, 1020.0), version(2, 1030.0)),
        rejected=(),
        swaps=(swap(1, 1020.2), swap(2, 1030.2, stall_ms=65.0)),
        counts=COUNTS,
        dropped=1,
        requests=60,
        requests_failed=0,
        drained=True,
    )
    return replace(full, **changes)


def test_an_interval_is_that_of_resampling_the_outcomes():
    outcomes = np.repeat([1.0, 0.0], [37, 163])
    draws = np.random.default_rng(0).choice(outcomes, (20_000, 200)).mean(axis=1)
    found = report.share_interval(0.185, 200)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(draws, (2.5, 97.5))), abs=0.006)


def test_the_interval_of_a_change_is_wider_than_either():
    found = report.change_interval(0.2, 200, 0.5, 200)
    # The normal approximation: 0.3 ± 1.96·sqrt(0.2·0.8/200 + 0.5·0.5/200)
    assert (found.low, found.high) == pytest.approx((0.3 - 0.0887, 0.3 + 0.0887), abs=0.01)


def test_no_outcome_has_no_interval():
    with pytest.raises(ValueError, match="at least one outcome"):
        report.share_interval(0.0, 0)


def test_rolling_means_start_with_the_first_full_window():
    assert report.rolling([0, 1, 1, 0], window=2).tolist() == [0.5, 1.0, 0.5]
    assert report.rolling([1, 0], window=5).tolist() == [0.5]
    assert report.rolling([]).tolist() == []


def test_the_newest_version_is_the_last_swapped_in_whatever_the_order_they_are_told_in():
    swaps = [swap(2, 30.0), swap(1, 20.0)]
    assert [report.newest_at(swaps, at) for at in (19.9, 20.0, 29.0, 31.0)] == [0, 1, 1, 2]


def test_first_replies_count_for_the_version_that_gave_them():
    rows = report.build(evidence()).per_version
    assert [(row.version, row.first_replies, row.score) for row in rows] == [(0, 2, 0.0), (1, 1, 1.0), (2, 1, 1.0)]
    assert [row.after_s for row in rows] == [10.0, 20.0, 30.0]
    assert [row.pause_ms for row in rows] == [None, 40.0, 65.0]
    assert [row.samples for row in rows] == [0, 2, 2]


def test_a_stall_counts_only_in_streams_that_ran_over_a_swap():
    result = report.build(evidence())
    assert result.streams_over_swaps == 2
    assert result.longest_stall_ms == pytest.approx(120)
    assert result.longest_gap_without_swap_ms == pytest.approx(300)
    assert result.longest_pause_ms == 65.0
    assert report.build(evidence(swaps=())).longest_stall_ms is None


def test_a_success_has_no_shortcoming():
    assert report.build(evidence()).shortcomings == ()


def test_a_tolerated_loss_of_answers_is_no_shortcoming():
    assert report.build(evidence(after=(evaluation(0.9, 0.78),))).shortcomings == ()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"after": (evaluation(0.45, 0.82),)}, "the score changed by +0.25"),
        ({"after": (evaluation(0.9, 0.76),)}, "right answers changed by -0.06"),
        ({"requests_failed": 2}, "2 of 60 requests failed"),
        ({"rejected": (VersionEvent(2, "rejected", "canary error 0.1", 1030.2),)}, "1 of 2 versions rejected: canary"),
        ({"drained": False}, "still waiting"),
    ],
)
def test_a_failed_demonstration_says_what_failed(changes, told):
    [shortcoming] = report.build(evidence(**changes)).shortcomings
    assert told in shortcoming


def test_the_files_say_what_was_measured(tmp_path):
    measured = evidence(run_directory=str(tmp_path))
    result = report.build(measured)
    report.write(result, measured, tmp_path)
    kept = json.loads((tmp_path / "report.json").read_text())
    assert kept.keys() >= PROMISED
    assert (kept["score_before"], kept["score_after"]) == (0.2, 0.9)
    assert (kept["turns"], kept["versions"], kept["seconds"], kept["seed"]) == (50, 2, 60.0, 3)
    assert kept["score_after_interval"]["low"] < 0.9 < kept["score_after_interval"]["high"]
    assert len(kept["per_version"]) == 3
    picture = (tmp_path / "learning_curve.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert kept["picture"] == str(tmp_path / "learning_curve.png")


def test_a_run_without_conversations_or_versions_still_has_a_report(tmp_path):
    measured = evidence(run_directory=str(tmp_path), first_replies=(), streams=(), versions=(), swaps=())
    result = report.build(measured)
    report.write(result, measured, tmp_path)
    assert result.longest_stall_ms is None
    assert (tmp_path / "learning_curve.png").stat().st_size > 0


def test_lines_tell_both_intervals():
    told = dict(report.lines(report.build(evidence())))
    interval = report.share_interval(0.2, 200)
    assert told["personalisation score"].startswith(f"0.20 [{interval.low:.2f}, {interval.high:.2f}] → 0.90 [")
    assert told["requests failed"] == "0 of 60"


def test_sessions_are_counted_until_three_in_a_row_pass():
    assert report.sessions_until([True, True, False, True, True, True, False]) == 6
    assert report.sessions_until([True, True, False] * 9) is None
    assert report.sessions_until([]) is None


def test_a_bare_number_is_liked_by_some_and_good_for_nobody():
    replies = tuple(first_reply(1012.0 + at, True, sound=at > 3) for at in range(8))
    result = report.build(evidence(first_replies=replies))
    assert (result.sessions_until_liked, result.sessions_until_good) == (3, 7)
    assert result.first_replies[3:5] == ((True, True, False), (True, True, True))
    assert [row.sound for row in result.per_version] == [0.5, None, None]


def test_several_people_have_their_own_rows_and_sessions():
    replies = [first_reply(1012.0 + at, at > 3, persona=("student", "teacher")[at % 2]) for at in range(12)]
    people = {
        "before": (evaluation(0.2, 0.8), evaluation(0.1, 0.8, "teacher")),
        "after": (evaluation(0.9, 0.7), evaluation(0.6, 0.7, "teacher")),
    }
    result = report.build(evidence(persona="all", first_replies=tuple(replies), **people))
    assert (result.score_before, result.score_after) == (pytest.approx(0.15), pytest.approx(0.75))
    assert [(row.persona, row.sessions, row.sessions_until_liked) for row in result.people] == [
        ("student", 6, 5), ("teacher", 6, 5),
    ]  # fmt: skip
    never = replies[:6] + [replace(reply, satisfied=False) for reply in replies[6:]]
    assert report.build(evidence(first_replies=tuple(never), **people)).sessions_until_liked is None


def test_unrelated_tasks_and_the_reference_are_reported():
    result = report.build(evidence())
    assert (result.unrelated_before, result.unrelated_after) == (pytest.approx(0.8), pytest.approx(0.7))
    assert result.unrelated_tasks == {"judge": (0.9, 0.8), "drill": (0.7, 0.6)}
    assert dict(report.lines(result))["unrelated tasks"].startswith("0.80 → 0.70 (judge 0.90 → 0.80")
    assert dict(report.lines(result))["sessions until three in a row"].startswith("never liked")


def test_the_divergence_is_that_of_the_sampler_from_the_reference():
    rng = np.random.default_rng(0)
    sampler, reference = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.3, 0.2])
    drawn = rng.choice(3, 200_000, p=sampler)
    expected = float((sampler * np.log(sampler / reference)).sum())
    assert report.k3(np.log(reference / sampler)[drawn]) == pytest.approx(expected, rel=0.02)
    assert report.k3(np.zeros(4, np.float32)) == 0


def sse(text: str | None) -> bytes:
    if text is None:
        return b"data: [DONE]\n\n"
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    body = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [choice]}
    return f"data: {json.dumps(body)}\n\n".encode()


async def answer_with_a_pause(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A server that streams two words, 0.15 s apart."""
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n" + sse("one "))
    await writer.drain()
    await asyncio.sleep(0.15)
    writer.write(sse("two") + sse(None))
    await writer.drain()
    writer.close()


async def test_the_client_measures_the_wait_between_chunks():
    server = await asyncio.start_server(answer_with_a_pause, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    wire = demo.Wire()
    async with server, demo.open_client(f"http://127.0.0.1:{port}/v1", wire) as client:
        stream = await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "count"}], stream=True
        )
        words = [chunk.choices[0].delta.content async for chunk in stream]
    assert words == ["one ", "two"]
    [seen] = wire.streams
    assert wire.num_requests == 1
    assert 0.14 < seen.longest_gap_s < 2
    assert seen.ended - seen.started >= seen.longest_gap_s
