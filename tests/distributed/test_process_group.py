"""What ranks tell each other: texts of any length arrive whole."""

from __future__ import annotations

import pytest

from bmgraph.distributed.process_group import Ranks
from bmgraph.errors import BmgraphError
from tests.helpers.ranks import run_ranks

LONG = "ä" * 3000


def _tell(rank: int) -> list[str]:
    ranks = Ranks.here()
    told = [ranks.broadcast_text(LONG if rank == 0 else "?"), ranks.broadcast_text("" if rank == 0 else "?")]
    told += ranks.gather_texts("" if rank == 0 else LONG)
    try:
        with ranks.fail_together():
            if rank == 1:
                raise BmgraphError(f"{LONG} the end")
    except BmgraphError as error:
        told.append(str(error))
    return told


def test_long_texts_arrive_whole() -> None:
    first, second = run_ranks(2, _tell)
    assert first[:4] == second[:4] == [LONG, "", "", LONG]
    assert first[4] == f"rank 1: {LONG} the end"
    assert second[4] == f"{LONG} the end"


def test_one_rank_tells_itself() -> None:
    ranks = Ranks()
    assert ranks.broadcast_text(LONG) == LONG
    assert ranks.gather_texts(LONG) == [LONG]
    with pytest.raises(BmgraphError, match="the end"), ranks.fail_together():
        raise BmgraphError("the end")
