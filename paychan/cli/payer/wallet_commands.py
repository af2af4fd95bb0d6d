"""`paychan wallet`: the wallet itself, and its backup, restore, check and words of a payer's wallet. `wallet.py` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from paychan.cli.payer.options import GroupWalletOption, WalletOption, examples, note_place
from paychan.cli.terminal import JsonOption, fail

app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)

TypedWords = Annotated[bool, typer.Option("--words", help="Use the words of the seed, which you type.")]
WordsSource = Annotated[
    Path | None, typer.Option("--words-file", help='Read the words from this file, "-" for standard input.')
]


@app.callback(
    invoke_without_command=True,
    epilog=examples(
        "paychan wallet   (channels, and what was spent for requests by host and day)", "paychan wallet --json"
    ),
)
def wallet_(context: typer.Context, wallet: GroupWalletOption = None, as_json: JsonOption = False) -> None:
    """Show the wallet: its channels, and what was spent for requests by host and day."""
    if context.invoked_subcommand is not None:
        source = context.get_parameter_source("wallet")
        if as_json or (source is not None and source.name == "COMMANDLINE"):
            fail(f"--wallet and --json stand after `{context.invoked_subcommand}`", 2)
        return
    from paychan.cli.payer.spending import show_wallet
    from paychan.cli.payer.terminal import exit_on_error

    note_place(wallet)
    with exit_on_error(as_json):
        if not show_wallet(wallet, as_json):
            raise typer.Exit(1)


@app.command(epilog=examples("paychan wallet receipts", "paychan wallet receipts --json"))
def receipts(wallet: WalletOption = None, as_json: JsonOption = False) -> None:
    """Show the requests that were paid for. --json has each receipt as the server sent it."""
    from paychan.cli.payer.spending import show_receipts
    from paychan.cli.payer.terminal import exit_on_error

    with exit_on_error(as_json):
        show_receipts(wallet, as_json)


@app.command(
    epilog=examples(
        "paychan wallet budget --per-request 50 --per-day 1000",
        "paychan wallet budget --host api.example --host shop.example:8080",
        "paychan wallet budget --anew   (takes all limits away)",
    )
)
def budget(
    per_request: Annotated[
        int | None, typer.Option("--per-request", metavar="SAT", help="Highest price of one request.")
    ] = None,
    per_host: Annotated[int | None, typer.Option("--per-host", metavar="SAT", help="Highest sum for one host.")] = None,
    per_day: Annotated[
        int | None, typer.Option("--per-day", metavar="SAT", help="Highest sum of one day (UTC).")
    ] = None,
    total: Annotated[int | None, typer.Option("--total", metavar="SAT", help="Highest sum in all.")] = None,
    host: Annotated[
        list[str] | None, typer.Option("--host", help="A host that may be paid, all others not. May be repeated.")
    ] = None,
    anew: Annotated[bool, typer.Option("--anew", help="Take away the limits that this command does not set.")] = False,
    wallet: WalletOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set or show the wallet's limits for paid requests. They hold for all programs, beside the budget of each."""
    from paychan.cli.payer.terminal import exit_on_error
    from paychan.cli.payer.wallet_budget import set_budget

    changes = {"per_request": per_request, "per_host": per_host, "per_day": per_day, "total": total}
    with exit_on_error(as_json):
        set_budget(wallet, changes, host or [], as_json, anew=anew)


@app.command(epilog=examples("paychan wallet backup /media/usb", "paychan wallet backup ~/my.wallet"))
def backup(
    to: Annotated[
        Path, typer.Argument(metavar="FILE|DIR", help="New file, or a directory for it.", show_default=False)
    ],
    wallet: WalletOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write one file with the seed, all channels, the budget and the sums spent. Keep it secret: it holds all keys.

    Back up after each new channel. Later payments need no new backup: a restored channel takes them over from the server.
    """
    from paychan.cli.payer.terminal import exit_on_error
    from paychan.cli.payer.wallet import back_up

    with exit_on_error(as_json):
        back_up(wallet, to, as_json)


@app.command(
    epilog=examples(
        "paychan wallet restore /media/usb/paychan-20261130T120000Z.wallet",
        "paychan wallet restore /media/usb   (the newest backup there)",
        "paychan wallet restore --words   (keys only)",
        "paychan wallet restore --words --server http://localhost:8000 --expires 1800000000   (and an open channel)",
    )
)
def restore(
    source: Annotated[
        Path | None, typer.Argument(metavar="FILE|DIR", help="A backup, or a directory of them.", show_default=False)
    ] = None,
    words: TypedWords = False,
    words_file: WordsSource = None,
    server: Annotated[
        str, typer.Option(metavar="URL", help="Restore a channel of this server, from the wallet's seed.")
    ] = "",
    expires: Annotated[int | None, typer.Option(metavar="UNIX", help="Its expiry, as Unix time.")] = None,
    index: Annotated[int, typer.Option(min=0, help="Index of its key: 0 for the wallet's first channel.")] = 0,
    network: Annotated[
        Literal["live", "test", "regtest"] | None, typer.Option(help="Accept only this Bitcoin network.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Use the funding that a debug server derives.")] = False,
    wallet: WalletOption = None,
    as_json: JsonOption = False,
) -> None:
    """Restore a wallet from a backup, or its keys from the words of its seed.

    What the wallet knows better than the backup stays. A restored channel takes over later payments from the server,
    with its next command. The words alone bring back keys, and so the change of settled channels: `paychan wallet words
    --descriptor`. An open channel also needs its server and its expiry: --server URL --expires UNIX.
    """
    from paychan.cli.payer.terminal import exit_on_error
    from paychan.cli.payer.wallet import restore_channel, restore_file, restore_words

    with exit_on_error(as_json):
        if server:
            if expires is None or source is not None:
                fail("--server needs --expires, and no backup", 2)
            if words or words_file is not None:
                restore_words(wallet, words_file, as_json, is_all=False)
            restore_channel(wallet, server, expires, index, network, as_json, debug=debug)
        elif (source is not None) == (words or words_file is not None):
            fail("give either a backup, or --words, or --words-file")
        elif source is None:
            restore_words(wallet, words_file, as_json)
        else:
            restore_file(wallet, source, as_json)


@app.command(
    epilog=examples(
        "paychan wallet check",
        "paychan wallet check /media/usb   (and compare the newest backup there)",
        "paychan wallet check --words   (and compare the words that you type)",
    )
)
def check(
    source: Annotated[
        Path | None, typer.Argument(metavar="FILE|DIR", help="Backup to compare.", show_default=False)
    ] = None,
    words: TypedWords = False,
    words_file: WordsSource = None,
    wallet: WalletOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read all files of the wallet; compare them with a backup or with the words. Status 1 if something is wrong."""
    from paychan.cli.payer.terminal import exit_on_error
    from paychan.cli.payer.wallet import ask_words, check_wallet

    with exit_on_error(as_json):
        typed = ask_words(words_file) if words or words_file is not None else None
        check_wallet(wallet, source, typed, as_json)


@app.command(
    epilog=examples(
        "paychan wallet words",
        "paychan wallet words --words-file /media/usb/words",
        "paychan wallet words --descriptor   (for `importdescriptors` of Bitcoin Core; asks before)",
    )
)
def words(
    words_file: Annotated[
        Path | None, typer.Option("--words-file", help="Write the words to this new file instead of showing them.")
    ] = None,
    descriptor: Annotated[
        bool, typer.Option("--descriptor", help="Print the private descriptor of all addresses for change instead.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Print the descriptor without a question.")] = False,
    network: Annotated[
        Literal["live", "test", "regtest"], typer.Option(help="Bitcoin network of the descriptor.")
    ] = "live",
    wallet: WalletOption = None,
) -> None:
    """Show the words of the wallet's seed, on a page of the terminal that disappears. They give access to all keys."""
    from paychan.cli.payer.terminal import exit_on_error
    from paychan.cli.payer.wallet import show_descriptor, show_words

    with exit_on_error(as_json=False):
        if descriptor:
            show_descriptor(wallet, network, yes=yes)
        else:
            show_words(wallet, words_file)
