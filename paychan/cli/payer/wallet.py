"""Back up a payer's wallet, restore and check it, and show the words of its seed, for `paychan wallet`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import typer

from paychan.cli.payer.terminal import Facts, facts, problem, problem_facts
from paychan.cli.terminal import command, fail, out, say, show_facts, show_json, terminal_width, warn, whole
from paychan.client.backup import (
    SUFFIX,
    Chosen,
    Finding,
    Restored,
    check,
    newest_backup,
    restore,
    restore_seed,
    take_backup,
    without_words,
    write_backup,
)
from paychan.client.seed import Seed, seed_of_words
from paychan.client.wallet import FORGOTTEN, Wallet
from paychan.protocol.types import Network
from paychan.shared.layout import numbered
from paychan.shared.ownpage import own_page
from paychan.shared.wording import counted, moment
from paychan.shared.words import WORD_COUNTS, WrongWords


def back_up(directory: Path | None, to: Path, as_json: bool) -> None:
    """Write a backup; end with status 1 if it lacks a channel."""
    now = int(time.time())
    taken, problems = take_backup(Wallet(directory), now)
    path = to.expanduser()
    if path.is_dir():
        path /= time.strftime("paychan-%Y%m%dT%H%M%SZ", time.gmtime(now)) + SUFFIX
    write_backup(taken, path)
    missing = [problem_facts(name, error) for name, error in problems.items()]
    if as_json:
        forgotten = len(taken.forgotten or ())
        show_json({"file": str(path), "channels": len(taken.channels), "forgotten": forgotten, "missing": missing})
    else:
        number = _number(len(taken.channels), len(taken.forgotten or ()))
        say(f"Wrote {number} to {path}. Keep it secret: it holds all keys.")
        for name, error in problems.items():
            warn(f"{name} is not in it: {error}.")
    if problems:
        raise typer.Exit(1)


def restore_file(directory: Path | None, source: Path, as_json: bool) -> None:
    """Restore a backup: a file, or the newest in a directory."""
    chosen, wallet = newest_backup(source.expanduser()), Wallet(directory)
    _warn_of_skipped(chosen, as_json)
    _show_restored(chosen, wallet, restore(wallet, chosen.backup), as_json)


def restore_channel(
    directory: Path | None, server: str, expires: int, index: int, network: str | None, as_json: bool, *, debug: bool
) -> None:
    """Make a channel's file again, from the seed and the server's terms."""
    from paychan.client import Payer

    chosen = None if network is None else Network(network)
    with Payer(server, wallet=directory, network=chosen) as payer:
        try:
            channel = payer.restore_channel(expires, index)
        except FileExistsError as error:
            fail(f"the wallet has this channel: {error}")
        with channel:
            if debug:
                channel.fund_debug()
            if as_json:
                show_json(facts(channel.record))
            else:
                show_facts(
                    f"Channel {channel.name}",
                    ("Address", channel.address),
                    ("Payments", "the next command takes over the newest one from the server"),
                    ("Next", command("channel", "open", channel.name)),
                )


def restore_words(directory: Path | None, words_file: Path | None, as_json: bool, *, is_all: bool = True) -> None:
    """Restore the seed from its words; unless this is all, show nothing."""
    words, wallet = ask_words(words_file), Wallet(directory)
    restore_seed(wallet, seed_of_words(words))
    if not is_all:
        return
    if as_json:
        show_json({"directory": str(wallet.directory), "written": [], "kept": [], "forgotten": [], "replaced": []})
        return
    show_facts(
        f"Wallet {wallet.directory}",
        ("Seed", "restored; a new channel gets a key that no earlier channel had"),
        ("Channels", "not restored: expiry and server key of a channel are in a backup only"),
        ("Next", command("wallet", "words", "--descriptor")),
    )


def check_wallet(directory: Path | None, source: Path | None, words: list[str] | None, as_json: bool) -> None:
    """Show problems of a wallet; end with status 1 if there are any."""
    wallet = Wallet(directory)
    chosen = None if source is None else newest_backup(source.expanduser())
    if chosen is not None:
        _warn_of_skipped(chosen, as_json)
    found = check(wallet, None if chosen is None else chosen.backup)
    if words is not None and wallet.seed.read().entropy != seed_of_words(words).entropy:
        found.append(Finding("", "these are not the words of this wallet's seed"))
    random = without_words(wallet.read_all()[0])
    wrong = any(not each.is_note for each in found)
    forgotten = sum(1 for _ in (wallet.directory / FORGOTTEN).glob("[!.]*.json"))
    if as_json:
        problems = [{"name": each.name, "error": each.text} for each in found if not each.is_note]
        notes = [{"name": each.name, "note": each.text} for each in found if each.is_note]
        counts = {"channels": len(wallet.names()), "forgotten": forgotten}
        shown = {"problems": problems, "notes": notes, "without_words": random, **counts}
        show_json(shown | ({} if chosen is None else {"backup": str(chosen.path), "skipped": _skipped(chosen)}))
    else:
        if chosen is not None:
            say(f"Compared with {chosen.path}, written at {moment(chosen.backup.created_at)}.")
        for each in found:
            warn(f"{each.name or 'wallet'}  {each.text.rstrip('.')}.")
        if random:
            say(f"No words give the keys of these channels, which are of an earlier version: {', '.join(random)}")
        if not wrong:
            say(f"{_number(len(wallet.names()), forgotten)} in {wallet.directory}: no problem found.")
    if wrong:
        raise typer.Exit(1)


def show_words(directory: Path | None, words_file: Path | None) -> None:
    """Show the words on a terminal, or write them to a new file."""
    wallet = Wallet(directory)
    seed = wallet.seed.read()
    if words_file is not None:
        _write_words(words_file.expanduser(), seed)
    else:
        _show_words(seed)
    if random := without_words(wallet.read_all()[0]):
        warn(f"Not covered by the words, but by a backup: {', '.join(random)}.")


def show_descriptor(directory: Path | None, network: str, *, yes: bool) -> None:
    """Print the private descriptor of all addresses for change, alone on a line; ask before, unless `yes`."""
    if not yes:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            fail("the descriptor gives access to all keys, and this is no terminal to ask at: --yes prints it")
        typer.confirm("The descriptor gives access to all keys of this wallet. Print it now?", abort=True)
    out.print(Wallet(directory).seed.read().descriptor(Network(network)), markup=False, soft_wrap=True)


def _number(channels: int, forgotten: int) -> str:
    return counted(channels, "channel") + f" and {counted(forgotten, 'forgotten one')}" * bool(forgotten)


def _skipped(chosen: Chosen) -> list[Facts]:
    return [{"file": str(path), **problem(error)} for path, error in chosen.skipped.items()]


def _warn_of_skipped(chosen: Chosen, as_json: bool) -> None:
    """Name the files that may be newer backups, and can't be read."""
    if not as_json:
        for error in chosen.skipped.values():
            warn(f"skipped: {error}.")


def _show_restored(chosen: Chosen, wallet: Wallet, done: Restored, as_json: bool) -> None:
    if as_json:
        names = {each: getattr(done, each) for each in ("written", "kept", "forgotten", "replaced")}
        show_json({"file": str(chosen.path), "directory": str(wallet.directory), **names, "skipped": _skipped(chosen)})
        return
    first = next(iter((*done.written, *done.replaced, *done.kept)), "")
    show_facts(
        f"Wallet {wallet.directory}",
        ("From", whole(chosen.path)),
        ("Restored", ", ".join(done.written)),
        ("Replaced", ", ".join(done.replaced)),
        ("Forgotten", ", ".join(done.forgotten)),
        ("Unchanged", ", ".join(done.kept) + "; the wallet knew them as the backup does, or better" * bool(done.kept)),
        ("Next", command("channel", "status", first) if first else command("wallet", "check")),
    )


# --- the words ------------------------------------------------------------------------------------------------------


def ask_words(path: Path | None) -> list[str]:
    """Read words from a file, from standard input, or from a person who types them."""
    if path is None and sys.stdin.isatty():
        typed = _type_words()
    else:
        named = path is not None and str(path) != "-"
        typed = (path.expanduser().read_text("utf-8") if path and named else sys.stdin.read()).split()
    try:
        seed_of_words(typed)
    except WrongWords as error:
        sentence = str(error).rstrip(".")
        stop = "" if sentence.endswith("?") else "."
        fail(f"{sentence}{stop} Compare what you typed with the words that you wrote down, and try again.")
    return typed


def _type_words() -> list[str]:
    typed: list[str] = []
    with own_page(out):
        say("Type the words of the seed, one or several at a time; four letters of each are enough.")
        say("After the last one, press Enter on an empty line.")
        while len(typed) < max(WORD_COUNTS):
            line = out.input(f"Word {len(typed) + 1}: ").split()
            if not line:
                break
            typed += line
    return typed


def _write_words(path: Path, seed: Seed) -> None:
    try:
        path.touch(0o600, exist_ok=False)
    except FileExistsError:
        fail(f"{path} exists already and stays as it is: give another name.")
    path.write_text(" ".join(seed.words) + "\n")
    say(f"The words are in {path}. Move it to a place that no program reads: the words give access to all keys.")


def _show_words(seed: Seed) -> None:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        fail("the words are shown on a terminal only, and this is not one. For a script: --words-file PATH")
    typer.confirm("The words give access to all keys of this wallet. Show them now?", abort=True)
    with own_page(out):
        for line in numbered(seed.words, terminal_width()):
            say(line, "bold")
        say("Write them down on paper, with their numbers.")
        out.input("\nPress Enter when you have written them down. ")
    say(
        "`paychan wallet check --words` compares what you wrote. A refund needs a backup, too: `paychan wallet backup DIR`."
    )
