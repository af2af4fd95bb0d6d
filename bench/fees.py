"""Draw what a settlement that is not mined pays as its deadline comes nearer: the curve, and the steps really taken.

    python bench/fees.py

Everything is computed by paychan.protocol.fees, for really signed payments and the rules of a server's configuration.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import typer
from coincurve import PrivateKey
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from msgspec import Struct
from rich.console import Console

from paychan.config import load_server_config
from paychan.protocol.address import key_script
from paychan.protocol.channel import Channel, CloseReason, Closing, Rules, State
from paychan.protocol.fees import ChainFees, Shortfall, budget_sat, deadline, is_due, plan_closing, wanted_rate
from paychan.protocol.kinds.script import make_terms
from paychan.protocol.payment import sign_payment
from paychan.protocol.settlement import Settlement, settlement_size
from paychan.protocol.types import OutPoint, Sat, UnixTime

HERE = Path(__file__).parent
CONFIG = HERE.parent / "config/live/server.toml"
PLOT = HERE / "plots/fees.svg"

EXPIRY = UnixTime(1_800_000_000)
FUNDING_SAT = Sat(1_000_000)
LOOK_SECONDS = 30
"""The watcher's interval by default."""

HOUR = 3600
DESTINATION = key_script(PrivateKey(b"\x03" * 32).public_key.format())

BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#c8561b", "#2d7d46", "#6b6b6b"


class Story(Struct, frozen=True):
    """One channel in one climate: what it received, what the chain estimates, and how it is drawn."""

    received_sat: int
    estimate_sat_per_vb: int
    colour: str
    curve: bool
    """Draw what the curve asks for beside what is paid."""


STORIES = (
    Story(20_000, 10, GREEN, curve=False),
    Story(500_000, 60, ORANGE, curve=True),
    Story(500_000, 10, BLUE, curve=True),
)
"""The small channel lies under the large one until its budget is used up."""


def closing(received_sat: int, rules: Rules) -> Channel:
    """Make a channel that begins to close when its settlement period does."""
    client, server = PrivateKey(b"\x01" * 32), PrivateKey(b"\x02" * 32)
    terms = make_terms(server.public_key.format(), client.public_key.format(), EXPIRY)
    outpoint, script = OutPoint(bytes(32), 0), key_script(client.public_key.format())
    payment = sign_payment(client, terms, outpoint, script, Sat(FUNDING_SAT - received_sat))
    begun = UnixTime(EXPIRY - rules.settlement_period_seconds)
    return Channel(
        terms=terms,
        outpoint=outpoint,
        funding_sat=FUNDING_SAT,
        change_script=script,
        payment=payment,
        state=State.CLOSING,
        seq=1,
        opened_at=begun,
        closing=Closing(CloseReason.EXPIRY, begun),
    )


def looks(channel: Channel) -> range:
    """Times at which the watcher looks, from the beginning to the expiry."""
    assert channel.closing is not None
    return range(channel.closing.begun_at, channel.terms.expiry + 1, LOOK_SECONDS)


def settlements(channel: Channel, rules: Rules, chain: ChainFees) -> Iterator[tuple[UnixTime, Settlement]]:
    """Yield each settlement that is published while none is mined, and when."""
    paid: Settlement | None = None
    size = settlement_size([channel.claim], DESTINATION)
    for now in map(UnixTime, looks(channel)):
        rate = wanted_rate(channel, rules, now, chain)
        if paid is not None and not is_due(channel, paid, rules, now, chain):
            continue
        fee = plan_closing([channel], DESTINATION, rules, rate)
        assert not isinstance(fee, Shortfall)
        if paid is None or fee > paid.fee_sat:
            paid = Settlement(bytes(size), b"", fee)
            yield now, paid


def hours(channel: Channel, moment: int) -> float:
    """Hours since the closing began."""
    assert channel.closing is not None
    return (moment - channel.closing.begun_at) / HOUR


def draw_story(axes: Axes, story: Story, rules: Rules) -> None:
    """Draw one channel's curve, and its settlements as steps."""
    channel, chain = closing(story.received_sat, rules), ChainFees(story.estimate_sat_per_vb)
    if story.curve:
        rates = [(now, wanted_rate(channel, rules, UnixTime(now), chain)) for now in looks(channel)]
        risen = [later for before, later in pairwise(rates) if before[1] != later[1]]
        points = [rates[0], *risen, rates[-1]]
        x, y = [hours(channel, now) for now, _ in points], [rate for _, rate in points]
        axes.plot(x, y, color=story.colour, linewidth=1, alpha=0.6)
    steps = list(settlements(channel, rules, chain))
    x, paid = [hours(channel, now) for now, _ in steps], [each.fee_sat / each.size for _, each in steps]
    end = hours(channel, channel.terms.expiry)
    axes.step([*x, end], [*paid, paid[-1]], where="post", color=story.colour, linewidth=2)
    axes.plot(x, paid, "o", color=story.colour, markersize=4.5)


def tell(axes: Axes, story: Story, rules: Rules) -> None:
    """Say at the line what it is."""
    channel, begin = closing(story.received_sat, rules), story.estimate_sat_per_vb
    size = settlement_size([channel.claim], DESTINATION)
    budget = budget_sat([channel.claim], size, rules.fee_share_percent)
    if story.curve:
        text, at, align = f"the chain estimates {begin} sat/vB", (0.06, begin), "left"
    else:
        text = f"the same, but {story.received_sat:,} sat received:\nno more than {budget:,} sat become fee"
        at, align = (hours(channel, deadline(channel, rules)) - 0.1, budget / size), "right"
    below = {"xytext": (0, -7), "textcoords": "offset points", "va": "top"}
    axes.annotate(text, at, color=story.colour, ha=align, **below)


def mark(axes: Axes, at: float, text: str, align: str = "center") -> None:
    """A moment, with its name above the picture."""
    axes.axvline(at, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    above = {"xycoords": ("data", "axes fraction"), "xytext": (0, 5), "textcoords": "offset points"}
    axes.annotate(text, (at, 1), color=GREY, ha=align, **above)


def draw(rules: Rules) -> Figure:
    """Draw all."""
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fees", "font.size": 10.5})
    figure = Figure(figsize=(8.6, 5), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    channel, most = closing(STORIES[0].received_sat, rules), rules.max_fee_sat_per_vb
    late, end = hours(channel, deadline(channel, rules)), hours(channel, channel.terms.expiry)
    axes.axvspan(late, end, color="#f1efe9", linewidth=0)
    for story in STORIES:
        draw_story(axes, story, rules)
        tell(axes, story, rules)
    mark(axes, late / 2, "half of the time:\nnothing waits for company")
    mark(axes, late, "deadline")
    mark(axes, end, "expiry", "right")
    axes.axhline(most, color=GREY, linewidth=1, linestyle=(0, (1, 2)))
    above = {"xytext": (0, 4), "textcoords": "offset points"}
    axes.annotate(f"settlement.max_fee_sat_per_vb = {most}", (0.06, most), color=GREY, **above)
    scale(axes, end, most)
    explain(axes, late / end)
    return figure


def scale(axes: Axes, end: float, most: int) -> None:
    """Axes with their names, no wider than what is drawn."""
    axes.set_yscale("log")
    least = min(story.estimate_sat_per_vb for story in STORIES)
    ticks = [tick for tick in (5, 10, 20, 50, 100, 200, 500, 1000) if least <= tick <= most]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(0, end)
    axes.set_ylim(least * 0.7, most * 1.4)
    axes.set_xlabel("hours since closing began")
    axes.set_ylabel("fee rate, sat/vB (logarithmic)")
    axes.spines[["top", "right"]].set_visible(False)


def explain(axes: Axes, right: float) -> None:
    """Say what thin and thick lines are, to the left of a place on the axis (0 to 1)."""
    line, dot = {"color": GREY, "linewidth": 1}, {"color": GREY, "marker": "o", "markersize": 4.5, "linewidth": 2}
    keys = [Line2D([], [], **line), Line2D([], [], **dot)]
    on_white = {"facecolor": "white", "edgecolor": "none", "framealpha": 1}
    names = ["what the curve asks for", "published, replaced once that is 25 % more"]
    axes.legend(keys, names, loc="lower right", bbox_to_anchor=(right, 0), **on_white, labelcolor=GREY)


def main(
    config: Annotated[
        Path, typer.Option(help="Whose fee rules are drawn.", show_default="config/live/server.toml")
    ] = CONFIG,
    out: Annotated[Path, typer.Option(help="The picture, .svg or .png.", show_default="bench/plots/fees.svg")] = PLOT,
) -> None:
    """Draw the fee curve into one picture.

    Example: python bench/fees.py --config config/live/server.toml --out fees.png
    """
    figure = draw(load_server_config(config).rules)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None, dpi=130)
    Console().print(f"Drawn: {out}")


if __name__ == "__main__":
    typer.run(main)
