"""The entries that nobody has answered yet: the list of them stays short."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nfmasq.engine import UDP, IpMasq, Timeouts
from nfmasq.engine.table.entry import HASHED, NO_REPLY
from nfmasq.engine.table.line import Line


def entry() -> IpMasq:
    """Make an entry that stands in the tables and that nothing came back for."""
    return IpMasq(UDP, 1, 61000, 2, 1024, 3, 53, HASHED | NO_REPLY, Timeouts().table())


@given(answers=st.lists(st.booleans(), min_size=1, max_size=300))
def test_the_list_of_the_unanswered_is_never_much_longer_than_the_table(
    answers: list[bool],
) -> None:
    unanswered = Line(HASHED | NO_REPLY)
    table: list[IpMasq] = []
    for answered in [False, *answers]:
        table.append(entry())
        unanswered.join(table[-1], len(table))
        if answered:
            table.pop().flags = 0
        assert len(unanswered) <= 2 * len(table) + 2
