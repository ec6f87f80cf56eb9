"""Who is served unrecorded, as a gateway replica knows it."""

import pytest

from clawrl.errors import GatewayError
from clawrl.serving.consent import OptOuts
from clawrl.serving.sessions import identify
from clawrl.types import Consent


def opt_outs(*words: tuple[str, str | None, bool], users: tuple[str, ...] = ()) -> OptOuts:
    found = OptOuts(users)
    for user, session, train in words:
        found.take(Consent(user, session, train, 0.0))
    return found


def test_a_user_covers_all_their_sessions_and_nobody_elses():
    found = opt_outs(("ann", None, False))
    assert found.cover("ann", None)
    assert found.cover("ann", "s")
    assert not found.cover("bob", "s")


def test_a_session_covers_itself():
    found = opt_outs(("ann", "s", False))
    assert found.cover("ann", "s")
    assert not found.cover("ann", None)
    assert not found.cover("ann", "t")
    assert not found.cover("bob", "s")


def test_the_latest_word_of_each_holds():
    assert not opt_outs(("ann", None, False), ("ann", None, True)).cover("ann", "s")
    assert opt_outs(("ann", None, False), ("ann", "s", True)).cover("ann", "s")
    assert opt_outs(("ann", "s", False), ("ann", None, True)).cover("ann", "s")


def test_the_configuration_cannot_be_talked_over():
    assert opt_outs(("ann", None, True), users=("ann",)).cover("ann", "s")


def test_who_opted_out_once_is_looked_up_for_good():
    found = opt_outs(("ann", None, False), ("ann", None, True), ("bob", None, True), users=("eve",))
    assert [found.concern(user) for user in ("ann", "bob", "eve")] == [True, False, True]


@pytest.mark.parametrize(("said", "expected"), [("no", True), (" NO ", True), ("yes", False), (None, False)])
def test_the_header(said, expected):
    assert identify({} if said is None else {"x-train": said}, {}).opts_out is expected


@pytest.mark.parametrize("said", ["", "false", "0", "never"])
def test_what_may_be_meant_as_an_opt_out_is_not_taken_for_none(said):
    with pytest.raises(GatewayError, match=r"X-Train: '.*' is unknown; use no"):
        identify({"x-train": said}, {})
