"""The arithmetic of the benchmarks, and how they read a reply and a process."""

import json

import pytest

from jobs.bench.client import _tokens_of
from jobs.bench.figures import Figure, Stream, as_json, longest_gap, median_ratio, percentile, spread, table, throughput
from jobs.bench.processes import CLIENT, role


def stream(*arrivals: float, tokens: int = 10) -> Stream:
    return Stream(arrivals[0] - 1, arrivals, arrivals[0], arrivals[-1], tokens)


def test_a_ratio_is_the_median_over_pairs_not_a_ratio_of_medians():
    ours, theirs = [10.0, 2.0, 30.0], [10.0, 4.0, 20.0]
    assert median_ratio(ours, theirs) == 1.0
    assert spread(ours, theirs) == (0.75, 1.25)
    with pytest.raises(ValueError, match="shorter"):
        median_ratio([1.0, 2.0], [1.0])


def test_throughput_counts_all_streams_from_the_first_request_to_the_last_byte():
    assert throughput([stream(2, 3), stream(4, 6, tokens=40)]) == 50 / 5


def test_percentiles_are_values_that_occurred():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [percentile(values, share) for share in (0.01, 0.5, 0.8, 0.95, 1.0)] == [1, 3, 4, 5, 5]


@pytest.mark.parametrize(
    ("start", "end", "gap"),
    [
        (0.0, 100.0, 40.0),
        (12.0, 13.0, 10.0),  # inside one gap
        (20.5, 25.0, 2.0),  # the second stream's longer gap is over, the first one's have begun
        (31.0, 32.0, 40.0),
        (90.0, 95.0, 0.0),  # nobody was reading
    ],
)
def test_the_longest_gap_is_of_one_stream_and_touches_the_window(start: float, end: float, gap: float):
    assert longest_gap([stream(20, 22, 24, 26), stream(10, 20, 21), stream(30, 70)], start, end) == gap


def test_a_figure_knows_whether_it_met_its_goal():
    figures = [
        Figure("ratio", 0.9, at_least=0.85),
        Figure("gap", 250, "ms", at_most=200),
        Figure("count", 20),
    ]
    assert [figure.met for figure in figures] == [True, False, None]
    lines = table(figures).splitlines()
    assert lines[0].split() == ["ratio", "0.9", ">=", "0.85", "met"]
    assert lines[1].split() == ["gap", "250", "ms", "<=", "200", "MISSED"]
    assert lines[2].split() == ["count", "20"]
    assert json.loads(json.dumps(as_json(figures)))["gap"]["met"] is False


def reply(tokens: int, end: str = "data: [DONE]") -> bytes:
    usage = json.dumps({"choices": [], "usage": {"completion_tokens": tokens}})
    return f'data: {{"choices": []}}\n\ndata: {usage}\n\n{end}\n\n'.encode()


def test_a_reply_is_whole_only_with_all_its_tokens_and_its_end():
    assert _tokens_of(200, reply(64), 64) == (64, None)
    assert _tokens_of(200, reply(63), 64) == (63, "63 tokens instead of 64")
    assert "ended with" in str(_tokens_of(200, reply(64, 'data: {"error": {}}'), 64)[1])
    assert "HTTP 503" in str(_tokens_of(503, b"{}", 64)[1])


@pytest.mark.parametrize(
    ("title", "parent", "part"),
    [
        ("ray::ServeReplica:clawrl:policy.chat", "ray", "policy"),
        ("VLLM::EngineCore", "judge", "judge engine core"),
        ("VLLM::Worker", "judge engine core", "judge worker"),
        ("ray::ProxyActor", "ray", "http proxy"),
        ("ray::ServeController.listen_for_change", "ray", "ray"),
        ("ray::Journal.append", "ray", "Journal"),
        ("ray::RayTrainWorker.run (rank 0)", "ray", "RayTrainWorker"),
        ("ray::IDLE", "ray", "ray idle workers"),
        ("/x/raylet/raylet --socket", CLIENT, "ray"),
        ("python -c from multiprocessing.resource_tracker import main", "policy", "policy helper"),
    ],
)
def test_processes_are_known_by_their_titles(title: str, parent: str, part: str):
    assert role(title, parent) == part
