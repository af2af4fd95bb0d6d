"""Shows what `paychan withdraw --above` did, and why it left other channels alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paychan.cli.terminal import next_command, say, show_table
from paychan.shared.layout import Cell, Column, Value

_NOT_WITHDRAWABLE = {
    "change_elsewhere": "the channel can't continue, because its change goes elsewhere; payers choose that with --movable at "
    "`paychan channel new`",
    "opening_only": "only the opening payment was made, and settling it would publish the channel's secret; wait for one more",
}
"""Why a channel is not withdrawn from, by the name in the answer of the server."""


def show_withdrawals(answer: Mapping[str, Any]) -> None:
    """Show a line for each channel, then a line for each cause."""
    rows: list[tuple[Cell, ...]] = []
    for channel in answer["channels"]:
        went = (
            f"continues at {channel['moved_to']}" if channel["moved_to"] else f"moves by {channel['settlement_txid']}"
        )
        rows.append((channel["funding_source"], f"{channel['value_received']:,}", went))
    rows += [(refusal["channel"], "", Value(refusal["error"], "red")) for refusal in answer["refused"]]
    if rows:
        columns = Column("channel (txid:vout)"), Column("withdrawn sat", is_number=True), Column("outcome")
        show_table(columns, rows)
    else:
        say("No channel to withdraw from.")
    for reason, count in answer["not_withdrawable_because"].items():
        if count:
            say(f"{count:,} more not withdrawn from: {_NOT_WITHDRAWABLE[reason]}.")
    next_command("status", "FILE")
