"""The report: intervals, who was served by which version, stalls, the verdict, and the files it leaves."""

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest

from clawrl.types import Swap, VersionEvent, WeightVersion
from envs.chat.conversation import Evaluation
from jobs import demo, report
from jobs.report import Evidence, FirstReply, Stream

PROMISED = {
    "score_before", "score_after", "correct_before", "correct_after", "turns", "judgements", "hints", "versions",
    "swaps", "requests_failed", "longest_stall_ms", "seconds", "method", "seed",
}  # fmt: skip
COUNTS = {"main_turns": 50, "judgements": 40, "abstentions": 2, "hints": 11, "samples": 38, "consumed": 32}


def evaluation(score: float, correct: float) -> Evaluation:
    return Evaluation(
        persona="student",
        num_replies=200,
        score=score,
        correct=correct,
        shows_work=0.5,
        satisfied_and_correct=0.1,
        mean_length=30.0,
        forms={"plain": score},
        num_failed=0,
    )


def version(number: int, at: float) -> WeightVersion:
    metrics = {"loss": 0.5 / number, "lag_mean": 1.0}
    return WeightVersion(number, number - 1, "full", None, ("a", "b"), metrics, at)


def swap(number: int, at: float, stall_ms: float = 40.0) -> Swap:
    return Swap(number, "replica", stall_ms, 1e-5, 0.1, at)


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
        before=evaluation(0.2, 0.82),
        after=evaluation(0.9, 0.80),
        first_replies=tuple(FirstReply(at, satisfied, True) for at, satisfied in replies),
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
    assert report.build(evidence(after=evaluation(0.9, 0.78))).shortcomings == ()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"after": evaluation(0.45, 0.82)}, "the score changed by +0.25"),
        ({"after": evaluation(0.9, 0.76)}, "right answers changed by -0.06"),
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
