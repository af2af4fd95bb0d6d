"""Draw the stored results: payments/s and latency by connections, CPU time by part, and a comparison with the original.

    python bench/plot.py [--results DIRECTORY] [--out DIRECTORY]

The newest result of each kind counts. The same results give the same bytes. A picture whose results are missing is left
out, with the command that makes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import machine
import matplotlib as mpl
import typer
from fees import BLUE, GREEN, GREY, ORANGE
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

PLOTS = Path(__file__).parent / "plots"

Result = dict[str, Any]

ORIGINAL = {
    "original, a laptop of 2015": 912,
    "original, 9 cores of a server": 3_240,
}
"""Published payments/s of the original: the average of a run, and the peak divided by the number of cores."""

SERIES = {
    (1, "keep-alive"): ("v1", BLUE, "-"),
    (2, "keep-alive"): ("v2", GREEN, "-"),
    (1, "connection-each"): ("v1, a connection for each payment", BLUE, ":"),
    (2, "connection-each"): ("v2, a connection for each payment", GREEN, ":"),
}

PALE, SAND = "#9db8d9", "#d9cdb4"

AT = 32
"""Number of connections of the runs that are given as one figure."""


class Missing(Exception):
    """There is no result of a kind; the text is the command that makes one."""


def newest(directory: Path, name: str) -> list[Result]:
    """Read the newest result of each benchmark whose name begins with `prefix`."""
    found: dict[str, Result] = {}
    for path in sorted(directory.glob(f"{name}*.json"), key=lambda path: path.stem.rpartition("-")[2]):
        stored: Result = json.loads(path.read_text())
        found[stored["bench"]] = stored
    return [found[key] for key in sorted(found)]


def loads(directory: Path) -> dict[tuple[int, str], dict[int, Result]]:
    """Return the median run of bench/load.py for each version and mode, and each number of connections."""
    found: dict[tuple[int, str], dict[int, Result]] = {}
    for stored in newest(directory, "load-"):
        if not stored["http"]:  # a run with changed settings does not measure the server as shipped
            found.setdefault((stored["version"], stored["mode"]), {})[stored["connections"]] = stored["median"]
    if not found:
        command = "python bench/load.py --version 1 --connections 32"
        raise Missing(command)
    return {kind: dict(sorted(runs.items())) for kind, runs in sorted(found.items())}


# --- the pictures ---------------------------------------------------------------------------------------------------


def throughput(directory: Path) -> Figure:
    """Draw payments/s against connections."""
    figure, axes = canvas()
    for kind, runs in loads(directory).items():
        name, colour, line = SERIES[kind]
        rates = [each["payments_per_second"] for each in runs.values()]
        axes.plot(list(runs), rates, color=colour, linestyle=line, marker="o", markersize=4.5, label=name)
        axes.annotate(f"{rates[-1]:,}", (list(runs)[-1], rates[-1]), color=colour, **beside(5, 0))
    by_connections(axes, sorted({count for runs in loads(directory).values() for count in runs}))
    axes.set_ylim(0)
    axes.set_ylabel("payments/s, each verified and synced")
    axes.legend(frameon=False, loc="upper left")
    return figure


def latency(directory: Path) -> Figure:
    """Draw median and 99th percentile of the latency against connections."""
    figure, axes = canvas()
    for kind, runs in loads(directory).items():
        name, colour, line = SERIES[kind]
        if kind[1] != "keep-alive":
            continue
        p50, p99 = ([each[f"latency_ms_{which}"] for each in runs.values()] for which in ("p50", "p99"))
        axes.plot(list(runs), p50, color=colour, linestyle=line, marker="o", markersize=4.5, label=f"{name}, median")
        axes.plot(list(runs), p99, color=colour, linestyle="--", marker="o", markersize=3, label=f"{name}, 99 %")
    by_connections(axes, sorted({count for runs in loads(directory).values() for count in runs}))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylabel("milliseconds to the answer (logarithmic)")
    axes.legend(frameon=False, loc="upper left")
    return figure


def breakdown(directory: Path) -> Figure:
    """Draw the CPU time of a payment by part, as a bar for each version."""
    measured = newest(directory, "costs")
    if not measured:
        command = "python bench/costs.py"
        raise Missing(command)
    found, figure, axes = loads(directory), *canvas(2.9)
    bars = []
    for version in (2, 1):
        run = found.get((version, "keep-alive"), {}).get(AT)
        if run is None:
            command = f"python bench/load.py --version {version} --connections {AT}"
            raise Missing(command)
        bars.append(parts(measured[-1]["cpu_us"], version, run))
    for place, each in enumerate(bars):
        bar(axes, place, each)
    axes.set_yticks([0, 1], ["v2", "v1"])
    axes.set_xlim(0)
    axes.set_xlabel(f"µs of CPU for one payment, all threads of the server, {AT} connections")
    names = list(bars[0])
    handles = [axes.containers[index] for index in range(len(names))]
    axes.legend(handles, names, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    return figure


def parts(cpu_us: dict[str, float], version: int, run: Result) -> dict[str, float]:
    """Add up the parts that bench/costs.py measured alone; the rest of the time is the loop, sockets and kernel.

    Both are converted to verifications first: they were measured at different times, on a shared machine.
    """
    reading = sum(each for name, each in cpu_us.items() if name.startswith(f"v{version}: ") and "result" not in name)
    verifying = cpu_us["verify"] + cpu_us["sighash"]
    answering = cpu_us[f"v{version}: result"] + cpu_us["HTTP head of the answer"]
    storing = cpu_us["actor, machine, commit: all threads"] - verifying
    whole = run["server_cpu_verifies_per_payment"] * cpu_us["verify"]
    alone = reading + verifying + answering + storing
    return {
        "signature": verifying,
        "HTTP and payment read": reading,
        "actor, rules, record, store": storing,
        "answer": answering,
        "event loop, sockets, kernel": max(0.0, whole - alone),
    }


def bar(axes: Axes, place: int, amounts: dict[str, float]) -> None:
    """Stack the parts along the axis, each with its figure."""
    left, colours = 0.0, (ORANGE, BLUE, GREEN, PALE, SAND)
    for (_, each), colour in zip(amounts.items(), colours, strict=True):
        axes.barh(place, each, left=left, height=0.62, color=colour)
        if each > sum(amounts.values()) / 40:
            white = "black" if colour in (PALE, SAND) else "white"
            axes.text(left + each / 2, place, f"{each:.0f}", color=white, ha="center", va="center")
        left += each
    axes.annotate(f"{left:.0f}", (left, place), color=GREY, **beside(5, 0))


def original(directory: Path) -> Figure:
    """Draw the original's published figures beside those of this server."""
    bars = {name: (rate, GREY) for name, rate in ORIGINAL.items()}
    for (version, mode), runs in loads(directory).items():
        if mode == "keep-alive" and AT in runs:
            bars[f"v{version}, one core"] = (runs[AT]["payments_per_second"], BLUE)
    for stored in newest(directory, "stream-"):
        if stored["frames_in_flight"] == 1 and stored["payments_in_a_frame"] > 1:
            how = "newest of a frame verified" if stored["coalesce"] else "each verified"
            bars[f"stream, {how}, one core"] = (stored["median"]["payments_per_second"], GREEN)
    figure, axes = canvas(0.5 + 0.45 * len(bars))
    for place, (name, (rate, colour)) in enumerate(reversed(bars.items())):
        axes.barh(place, rate, height=0.62, color=colour)
        axes.annotate(f"{rate:,}  {name}", (rate, place), color=colour, **beside(5, 0))
    axes.set_yticks([])
    axes.set_xscale("log")
    axes.set_xlim(100, max(rate for rate, _ in bars.values()) * 30)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel(
        "payments/s (logarithmic)\npaychan syncs them to disk before it answers, the original kept them in memory"
    )
    return figure


PICTURES: dict[str, Callable[[Path], Figure]] = {
    "throughput": throughput,
    "latency": latency,
    "breakdown": breakdown,
    "original": original,
}


# --- drawing --------------------------------------------------------------------------------------------------------


def canvas(height: float = 4.2) -> tuple[Figure, Axes]:
    """Make an empty picture."""
    figure = Figure(figsize=(8.6, height), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def beside(right: float, up: float) -> dict[str, Any]:
    """Return annotation options that put a text beside its point, at this distance in points."""
    return {"xytext": (right, up), "textcoords": "offset points", "va": "center"}


def by_connections(axes: Axes, counts: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlabel("connections, each with a channel and one payment in flight (logarithmic)")


def main(
    results: Annotated[Path, typer.Option(help="Where results are.", show_default="bench/results")] = machine.RESULTS,
    out: Annotated[Path, typer.Option(help="Where pictures go.", show_default="bench/plots")] = PLOTS,
) -> None:
    """Draw the stored results into SVG files."""
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10.5})
        try:
            figure = draw(results)
        except Missing as command:
            Console().print(f"No results for {name}: {command}", soft_wrap=True)
            continue
        figure.savefig(out / f"{name}.svg", metadata={"Date": None})
        Console().print(f"Drawn: {out / name}.svg", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
