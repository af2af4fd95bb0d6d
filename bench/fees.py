"""Draw the fee of a settlement that is not mined as its deadline approaches: the target curve, and the actual steps.

    python bench/fees.py

paychan.protocol.fees computes all values, for really signed payments and the rules of a server's configuration.
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
from paychan.protocol.kinds.base import make_terms
from paychan.protocol.payment import sign_payment
from paychan.protocol.settlement import Settlement, settlement_size
from paychan.protocol.types import OutPoint, Sat, UnixTime

HERE = Path(__file__).parent
CONFIG = HERE.parent / "config/live/server.toml"
PLOT = HERE / "plots/fees.svg"

EXPIRY = UnixTime(1_800_000_000)
FUNDING_SAT = Sat(1_000_000)
SCAN_SECONDS = 30
"""Default interval of the watcher's scans."""

HOUR = 3600
DESTINATION = key_script(PrivateKey(b"\x03" * 32).public_key.format())

BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#c8561b", "#2d7d46", "#6b6b6b"


class Scenario(Struct, frozen=True):
    """One channel under one fee estimate: the amount received, the chain's estimate, and the drawing style."""

    received_sat: int
    estimate_sat_per_vb: int
    colour: str
    curve: bool
    """Draw the target curve beside the fees that are paid."""


SCENARIOS = (
    Scenario(20_000, 10, GREEN, curve=False),
    Scenario(500_000, 60, ORANGE, curve=True),
    Scenario(500_000, 10, BLUE, curve=True),
)
"""The curve of the small channel follows that of the large one until its budget is used up."""


def closing(received_sat: int, rules: Rules) -> Channel:
    """Make a channel whose closing begins with its settlement period."""
    client, server = PrivateKey(b"\x01" * 32), PrivateKey(b"\x02" * 32)
    terms = make_terms(server.public_key.format(), client.public_key.format(), EXPIRY)
    outpoint, script = OutPoint(bytes(32), 0), key_script(client.public_key.format())
    payment = sign_payment(client, terms, outpoint, Sat(FUNDING_SAT), script, Sat(FUNDING_SAT - received_sat))
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


def scan_times(channel: Channel) -> range:
    """Return the times of the watcher's scans, from the beginning of the closing to the expiry."""
    assert channel.closing is not None
    return range(channel.closing.begun_at, channel.terms.expiry.lock_time + 1, SCAN_SECONDS)


def settlements(channel: Channel, rules: Rules, chain: ChainFees) -> Iterator[tuple[UnixTime, Settlement]]:
    """Yield each settlement that is published while none is mined, with its time."""
    paid: Settlement | None = None
    size = settlement_size([channel.claim], DESTINATION)
    for now in map(UnixTime, scan_times(channel)):
        rate = wanted_rate(channel, rules, now, chain)
        if paid is not None and not is_due(channel, paid, rules, now, chain):
            continue
        fee = plan_closing([channel], DESTINATION, rules, rate)
        assert not isinstance(fee, Shortfall)
        if paid is None or fee > paid.fee_sat:
            paid = Settlement(bytes(size), b"", fee)
            yield now, paid


def hours(channel: Channel, moment: int) -> float:
    """Return the hours since the closing began."""
    assert channel.closing is not None
    return (moment - channel.closing.begun_at) / HOUR


def draw_story(axes: Axes, scenario: Scenario, rules: Rules) -> None:
    """Draw one channel's curve, and its settlements as steps."""
    channel, chain = closing(scenario.received_sat, rules), ChainFees(scenario.estimate_sat_per_vb)
    if scenario.curve:
        rates = [(now, wanted_rate(channel, rules, UnixTime(now), chain)) for now in scan_times(channel)]
        risen = [later for before, later in pairwise(rates) if before[1] != later[1]]
        points = [rates[0], *risen, rates[-1]]
        x, y = [hours(channel, now) for now, _ in points], [rate for _, rate in points]
        axes.plot(x, y, color=scenario.colour, linewidth=1, alpha=0.6)
    steps = list(settlements(channel, rules, chain))
    x, paid = [hours(channel, now) for now, _ in steps], [each.fee_sat / each.size for _, each in steps]
    end = hours(channel, channel.terms.expiry.lock_time)
    axes.step([*x, end], [*paid, paid[-1]], where="post", color=scenario.colour, linewidth=2)
    axes.plot(x, paid, "o", color=scenario.colour, markersize=4.5)


def label_line(axes: Axes, scenario: Scenario, rules: Rules) -> None:
    """Label the line."""
    channel, begin = closing(scenario.received_sat, rules), scenario.estimate_sat_per_vb
    size = settlement_size([channel.claim], DESTINATION)
    budget = budget_sat([channel.claim], size, rules)
    if scenario.curve:
        text, at, align = f"the chain estimates {begin} sat/vB", (0.06, begin), "left"
    else:
        text = f"the same, but {scenario.received_sat:,} sat received:\nat most {budget:,} sat become fee"
        at, align = (hours(channel, deadline(channel, rules)) - 0.1, budget / size), "right"
    below = {"xytext": (0, -7), "textcoords": "offset points", "va": "top"}
    axes.annotate(text, at, color=scenario.colour, ha=align, **below)


def mark(axes: Axes, at: float, text: str, align: str = "center") -> None:
    """Mark a moment, with its name above the picture."""
    axes.axvline(at, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    above = {"xycoords": ("data", "axes fraction"), "xytext": (0, 5), "textcoords": "offset points"}
    axes.annotate(text, (at, 1), color=GREY, ha=align, **above)


def draw(rules: Rules) -> Figure:
    """Draw the whole picture."""
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fees", "font.size": 10.5})
    figure = Figure(figsize=(8.6, 5), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    channel, most = closing(SCENARIOS[0].received_sat, rules), rules.max_fee_sat_per_vb
    late, end = hours(channel, deadline(channel, rules)), hours(channel, channel.terms.expiry.lock_time)
    axes.axvspan(late, end, color="#f1efe9", linewidth=0)
    for scenario in SCENARIOS:
        draw_story(axes, scenario, rules)
        label_line(axes, scenario, rules)
    mark(axes, late / 2, "half of the time:\neach settles alone")
    mark(axes, late, "deadline")
    mark(axes, end, "expiry", "right")
    axes.axhline(most, color=GREY, linewidth=1, linestyle=(0, (1, 2)))
    above = {"xytext": (0, 4), "textcoords": "offset points"}
    axes.annotate(f"settlement.max_fee_sat_per_vb = {most}", (0.06, most), color=GREY, **above)
    scale(axes, end, most)
    explain(axes, late / end)
    return figure


def scale(axes: Axes, end: float, most: int) -> None:
    """Make axes with labels, no wider than the drawn range."""
    axes.set_yscale("log")
    least = min(scenario.estimate_sat_per_vb for scenario in SCENARIOS)
    ticks = [tick for tick in (5, 10, 20, 50, 100, 200, 500, 1000) if least <= tick <= most]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(0, end)
    axes.set_ylim(least * 0.7, most * 1.4)
    axes.set_xlabel("hours since closing began")
    axes.set_ylabel("fee rate, sat/vB (logarithmic)")
    axes.spines[["top", "right"]].set_visible(False)


def explain(axes: Axes, right: float) -> None:
    """Draw the legend of thin and thick lines, left of a place on the axis (0 to 1)."""
    line, dot = {"color": GREY, "linewidth": 1}, {"color": GREY, "marker": "o", "markersize": 4.5, "linewidth": 2}
    keys = [Line2D([], [], **line), Line2D([], [], **dot)]
    on_white = {"facecolor": "white", "edgecolor": "none", "framealpha": 1}
    names = ["target of the curve", "published, replaced once that is 25 % more"]
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
