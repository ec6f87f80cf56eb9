"""The registry's state machine, canary verdicts and checkpoints on disk."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from clawrl.errors import WeightSyncError
from clawrl.training.checkpoint import export_checkpoint, read_buckets, read_canary, require_whole, write_checkpoint
from clawrl.training.versions import Registry, canary_distance, canary_verdict, lag
from clawrl.types import Bucket, Canary, Swap, VersionEvent, WeightVersion


def registry_with(count: int) -> Registry:
    registry = Registry()
    for number in range(1, count + 1):
        registry.add(registry.candidate(number, number - 1, at=0.0), number - 1)
    return registry


def test_an_empty_registry_serves_version_zero():
    registry = Registry()
    assert (registry.head(), registry.next_number, registry.desired(), registry.serving()) == (0, 1, 0, 0)


def test_a_candidate_is_desired_before_it_serves():
    registry = registry_with(1)
    assert (registry.head(), registry.desired(), registry.serving(), registry.state(1)) == (1, 1, 0, "candidate")


def test_acceptance_retires_what_it_overtakes():
    registry = registry_with(3)
    assert [(e.version, e.state) for e in registry.accept(1, "ok", 0.0)] == [(1, "serving"), (0, "retired")]
    # 2 was never reported: 3 overtakes it and 1.
    events = registry.accept(3, "ok", 0.0)
    assert [(e.version, e.state) for e in events] == [(3, "serving"), (1, "retired"), (2, "retired")]
    assert registry.accept(3, "ok", 0.0) == []  # the second replica


def test_rejection_returns_to_the_parent():
    registry = registry_with(2)
    registry.accept(1, "ok", 0.0)
    assert [(e.version, e.state) for e in registry.reject(2, "bad", 0.0)] == [(2, "rejected")]
    assert (registry.desired(), registry.head(), registry.next_number) == (1, 1, 3)
    registry.add(registry.candidate(3, 1, 0.0), 1)
    assert registry.head() == 3


def test_rejecting_a_serving_version_restores_its_parent():
    registry = registry_with(2)
    registry.accept(1, "ok", 0.0)
    registry.accept(2, "ok", 0.0)
    events = registry.reject(2, "users correct it more", 0.0)
    assert [(e.version, e.state) for e in events] == [(2, "rejected"), (1, "serving")]
    assert registry.desired() == registry.serving() == 1


def test_rejection_takes_descendants_along():
    registry = registry_with(3)
    registry.accept(1, "ok", 0.0)
    assert [e.version for e in registry.reject(2, "bad", 0.0)] == [2, 3]
    assert registry.head() == 1


def test_siblings_of_a_rejected_version_stay():
    registry = registry_with(1)
    registry.accept(1, "ok", 0.0)
    registry.add(registry.candidate(2, 1, 0.0), 1)
    registry.reject(2, "bad", 0.0)
    registry.add(registry.candidate(3, 1, 0.0), 1)
    assert registry.reject(2, "bad again", 0.0) == []
    assert registry.head() == 3


@pytest.mark.parametrize("act", [lambda r: r.accept(2, "", 0.0), lambda r: r.candidate(4, 2, 0.0)])
def test_a_rejected_version_has_no_future(act):
    registry = registry_with(3)
    registry.reject(2, "bad", 0.0)
    with pytest.raises(WeightSyncError, match="rejected"):
        act(registry)


def test_numbers_follow_each_other_and_unknown_ones_are_refused():
    registry = registry_with(1)
    with pytest.raises(WeightSyncError, match="2 is"):
        registry.candidate(1, 0, 0.0)
    with pytest.raises(WeightSyncError, match="does not exist"):
        registry.state(7)
    with pytest.raises(WeightSyncError, match="cannot be rejected"):
        registry.reject(0, "no", 0.0)


def test_the_registry_comes_back_from_its_events():
    registry, events = Registry(), []
    versions = []
    for number, parent in [(1, 0), (2, 1), (3, 2)]:
        event = registry.candidate(number, parent, 0.0)
        registry.add(event, parent)
        events.append(event)
        versions.append(WeightVersion(number, parent, "full", None, (), {}, 0.0))
    events += registry.accept(1, "ok", 0.0)
    events += registry.reject(3, "bad", 0.0)
    again = Registry(versions, events)
    assert again.states() == registry.states() == {0: "retired", 1: "serving", 2: "candidate", 3: "rejected"}
    assert (again.head(), again.next_number, again.desired()) == (2, 4, 2)


def test_an_event_of_nothing_is_refused():
    with pytest.raises(WeightSyncError, match="never recorded"):
        Registry([], [VersionEvent(5, "serving", "", 0.0)])


def served(count: int) -> Registry:
    """Versions 1 to `count` that proved themselves one after the other."""
    registry = Registry()
    for number in range(1, count + 1):
        registry.add(registry.candidate(number, number - 1, 0.0), number - 1)
        registry.accept(number, "ok", 0.0)
    return registry


def test_rollback_rejects_all_that_is_newer_and_training_goes_on_from_there():
    registry = served(4)
    registry.add(registry.candidate(5, 4, 0.0), 4)
    events = registry.rollback(2, None, 1.0)
    assert [(e.version, e.state) for e in events] == [
        (3, "rejected"), (4, "rejected"), (5, "rejected"), (2, "serving"),
    ]  # fmt: skip
    assert {e.reason for e in events} == {"rolled back to 2 by user"}
    assert (registry.head(), registry.desired(), registry.serving(), registry.next_number) == (2, 2, 2, 6)
    registry.add(registry.candidate(6, 2, 2.0), 2)
    registry.accept(6, "ok", 2.0)
    assert registry.line(6) == (6, 2, 1, 0)
    assert [(e.version, e.state) for e in registry.rollback(None, "worse", 3.0)] == [(6, "rejected"), (2, "serving")]
    assert [(e.version, e.state) for e in registry.rollback(0, None, 4.0)][-1] == (0, "serving")


def test_rollback_to_the_serving_version_drops_its_candidates():
    registry = served(2)
    assert registry.rollback(2, None, 0.0) == []
    registry.add(registry.candidate(3, 2, 0.0), 2)
    assert [(e.version, e.state) for e in registry.rollback(2, "stop", 0.0)] == [(3, "rejected")]


def test_where_no_rollback_leads():
    with pytest.raises(WeightSyncError, match="none before it"):
        Registry().rollback(None, None, 0.0)
    registry = served(3)
    registry.add(registry.candidate(4, 3, 0.0), 3)
    with pytest.raises(WeightSyncError, match=r"4 has not served yet; .* is 3"):
        registry.rollback(4, None, 0.0)
    with pytest.raises(WeightSyncError, match="7 does not exist"):
        registry.rollback(7, None, 0.0)
    registry.rollback(1, None, 0.0)
    with pytest.raises(WeightSyncError, match=r"2 was rejected; .* is 1"):
        registry.rollback(2, None, 0.0)


def test_a_copy_changes_alone_until_its_events_are_applied():
    registry = served(2)
    events = (changed := registry.copy()).rollback(1, None, 0.0)
    assert (registry.desired(), changed.desired()) == (2, 1)
    registry.apply(events)
    assert registry.states() == changed.states()


def test_lag_counts_steps_of_the_line_not_numbers():
    assert [lag((5, 4, 3, 2, 1, 0), version) for version in (5, 4, 0, 6)] == [0, 1, 5, 0]
    restored = (12, 11, 3, 2, 1, 0)  # 4 to 10 were rejected
    assert [lag(restored, version) for version in (12, 11, 10, 4, 3, 2)] == [0, 1, 2, 2, 2, 3]
    assert lag((), 3) == 0


def swap(error: float | None, moved: float | None) -> Swap:
    return Swap(3, "replica", 20.0, error, moved, 0.0)


@pytest.mark.parametrize(
    ("error", "moved", "expected_move", "accepted"),
    [
        (1e-4, 0.3, 0.3, True),
        (0.5, 0.3, 0.3, False),  # serves other weights than the trainer's
        (float("nan"), 0.3, 0.3, False),
        (1e-4, 0.0, 1e-3, False),  # close enough to the tolerance to hide: the publish changed nothing
        (1e-4, 0.0, 0.0, True),  # a skipped step moves nothing, rightly
        (1e-4, 0.0, None, True),
        (1e-4, None, 0.3, True),
        (None, None, 0.3, None),
    ],
)
def test_canary_verdicts(error, moved, expected_move, accepted):
    verdict = canary_verdict(swap(error, moved), tolerance=2e-2, expected_move=expected_move)
    assert verdict.accepted is accepted
    assert verdict.reason


def canary(*values: float) -> Canary:
    return Canary((np.arange(len(values) + 1, dtype=np.int32),), (np.array(values, np.float32),))


def test_canary_distance_is_the_largest_difference():
    assert canary_distance(canary(-1.0, -2.0), canary(-1.5, -2.1)) == pytest.approx(0.5)
    assert canary_distance(canary(-1.0), canary(-1.0, -2.0)) is None


def bucket(**arrays: np.ndarray) -> Bucket:
    dtypes = tuple("bfloat16" if array.dtype == np.uint16 else array.dtype.name for array in arrays.values())
    return Bucket(tuple(arrays), dtypes, tuple(array.shape for array in arrays.values()), tuple(arrays.values()))


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"the base model's own weights")
    return folder


def test_a_checkpoint_reads_back_and_safetensors_agrees(base, tmp_path):
    import torch
    from safetensors.torch import load_file

    rng = np.random.default_rng(0)
    full = rng.normal(size=(3, 5)).astype(np.float32)
    half = torch.randn(4, 2).bfloat16()
    first = bucket(full=full, empty=np.zeros((0, 4), np.float32))
    second = bucket(half=half.view(torch.uint16).numpy())
    write_checkpoint(tmp_path / "7", [first, second], base, canary(-1.0, -2.0))
    assert (tmp_path / "7" / "tokenizer.json").exists()
    where = json.loads((tmp_path / "7" / "model.safetensors.index.json").read_text())["weight_map"]
    loaded = load_file(tmp_path / "7" / where["full"]) | load_file(tmp_path / "7" / where["half"])
    torch.testing.assert_close(loaded["full"], torch.from_numpy(full))
    torch.testing.assert_close(loaded["half"], half)
    (back,) = read_buckets(tmp_path / "7", bucket_bytes=1 << 20)
    types = dict(zip(back.names, back.dtypes, strict=True))
    assert types == {"full": "float32", "empty": "float32", "half": "bfloat16"}
    np.testing.assert_array_equal(back.arrays[back.names.index("half")], half.view(torch.uint16).numpy())
    assert len(list(read_buckets(tmp_path / "7", bucket_bytes=64))) == 2
    kept = read_canary(tmp_path / "7")
    assert kept is not None
    assert canary_distance(kept, canary(-1.0, -2.0)) == 0


def test_one_bucket_needs_no_index_and_replaces_what_a_crash_left(base, tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "torn").write_text("")
    write_checkpoint(tmp_path / "1", [bucket(a=np.ones(2, np.float32))], base)
    files = sorted(file.name for file in (tmp_path / "1").iterdir())
    assert files == ["config.json", "model.safetensors", "tokenizer.json"]
    assert read_canary(tmp_path / "1") is None


def test_a_broken_checkpoint_names_its_file(base, tmp_path):
    with pytest.raises(WeightSyncError, match=r"model\.safetensors cannot be read"):
        list(read_buckets(base, 1 << 20))
    with pytest.raises(WeightSyncError, match=r"no \*\.safetensors"):
        list(read_buckets(tmp_path, 1 << 20))


def break_canary(folder):
    (folder / "canary.npz").write_bytes(b"PK torn")


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda folder: shutil.rmtree(folder), "no \\*.safetensors"),
        (lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(), "model-00002-of-00002.* missing"),
        (lambda folder: os.truncate(folder / "model-00001-of-00002.safetensors", 90), "model-00001-of.*restore it"),
        (lambda folder: os.truncate(folder / "model-00001-of-00002.safetensors", 4), "model-00001-of.*restore it"),
        (lambda folder: (folder / "canary.npz").unlink(), "canary"),
        (break_canary, "canary"),
    ],
)
def test_a_damaged_checkpoint_is_seen_without_reading_it_all(base, tmp_path, harm, told):
    parts = [bucket(a=np.ones((8, 4), np.float32)), bucket(b=np.ones(2, np.float32))]
    write_checkpoint(tmp_path / "1", parts, base, canary(-1.0))
    require_whole(tmp_path / "1")
    harm(tmp_path / "1")
    with pytest.raises(WeightSyncError, match=told):
        require_whole(tmp_path / "1")


def test_an_export_is_a_folder_of_its_own(base, tmp_path):
    (base / "config.json").write_text('{"dtype": "bfloat16", "vocab_size": 9}')
    write_checkpoint(tmp_path / "1", [bucket(a=np.ones(2, np.float32))], base, canary(-1.0))
    export_checkpoint(tmp_path / "1", tmp_path / "out" / "one")
    assert {file.name for file in (tmp_path / "out" / "one").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip
    kept = json.loads((tmp_path / "out" / "one" / "config.json").read_text())
    assert kept == {"dtype": "float32", "vocab_size": 9}  # or transformers would round the weights
    (tmp_path / "out" / "one" / "mine.txt").write_text("precious")
    with pytest.raises(WeightSyncError, match="not empty; name another"):
        export_checkpoint(tmp_path / "1", tmp_path / "out" / "one")
    assert (tmp_path / "out" / "one" / "mine.txt").exists()
    with pytest.raises(WeightSyncError, match="absolute"):
        export_checkpoint(tmp_path / "1", Path("relative"))
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightSyncError, match="cannot be written"):
        export_checkpoint(tmp_path / "1", tmp_path / "file" / "x")


class TestUsersPolicies:
    """Everyone's 1 ── 2, Ann's 3 ── 4 from 1, Ben's 5 from 2; all but 2 proved themselves."""

    @pytest.fixture
    def registry(self) -> Registry:
        registry = Registry()
        for number, parent, scope in ((1, 0, ""), (2, 1, ""), (3, 1, "ann"), (4, 3, "ann"), (5, 2, "ben")):
            registry.add(registry.candidate(number, parent, 0.0, scope), parent, scope)
            if number != 2:
                registry.accept(number, "ok", 0.0)
        return registry

    def test_each_has_a_head_and_who_has_none_has_everyones(self, registry):
        assert [registry.head(scope) for scope in ("", "ann", "ben", "eve")] == [2, 4, 5, 2]
        assert [registry.desired(scope) for scope in ("", "ann", "ben", "eve")] == [2, 4, 5, 2]
        assert [registry.own(scope) for scope in ("ann", "eve")] == [4, None]
        assert registry.line(4) == (4, 3, 1, 0)
        assert registry.next_number == 6

    def test_only_the_own_are_overtaken(self, registry):
        assert registry.states() == {
            0: "retired", 1: "serving", 2: "candidate", 3: "retired", 4: "serving", 5: "serving"
        }  # fmt: skip

    def test_a_user_cannot_go_on_from_anothers(self, registry):
        with pytest.raises(WeightSyncError, match="version 6 comes from 4, which is another user's"):
            registry.candidate(6, 4, 0.0, "ben")
        with pytest.raises(WeightSyncError, match="another user's"):
            registry.candidate(6, 4, 0.0)

    def test_what_came_from_a_rejected_one_goes_with_it(self, registry):
        rejected = {event.version for event in registry.reject(2, "bad", 0.0)}
        assert rejected == {2, 5}
        assert (registry.own("ben"), registry.desired("ben"), registry.desired("ann")) == (None, 1, 4)

    def test_a_users_own_return_to_the_user(self, registry):
        events = registry.reject(4, "bad", 0.0)
        assert [(event.version, event.state) for event in events] == [(4, "rejected"), (3, "serving")]
        assert registry.desired("") == 2

    def test_a_rollback_is_of_one_policy(self, registry):
        assert [(e.version, e.state) for e in registry.copy().rollback(None, None, 0.0, "ann")] == [
            (4, "rejected"), (3, "serving")
        ]  # fmt: skip
        assert [(e.version, e.state) for e in registry.copy().rollback(3, None, 0.0)] == [
            (4, "rejected"), (3, "serving")
        ]  # fmt: skip
        back = registry.copy()
        assert {e.version for e in back.rollback(1, None, 0.0, "ann")} == {3, 4}
        assert (back.desired("ann"), back.head("ann")) == (2, 2)
        assert [(e.version, e.state) for e in registry.rollback(1, None, 0.0)] == [(2, "rejected"), (5, "rejected")]
        with pytest.raises(WeightSyncError, match="version 4 is of the user 'ann'"):
            registry.rollback(4, None, 0.0, "ben")

    def test_the_newest_of_each_are_kept(self, registry):
        assert sorted(registry.newest(1)) == [2, 4, 5]

    def test_it_is_read_from_the_records(self, registry):
        versions = [
            WeightVersion(number, parent, "lora", None, (), {}, 0.0, scope)
            for number, parent, scope in ((1, 0, ""), (2, 1, ""), (3, 1, "ann"))
        ]
        again = Registry(versions, [VersionEvent(3, "serving", "ok", 0.0)])
        assert (again.desired("ann"), again.desired(), again.scope(3), again.scopes()) == (3, 2, "ann", ["", "ann"])
