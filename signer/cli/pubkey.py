"""Commands that show public keys: of a channel, and extended ones with a warning about what they reveal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import bitcoin.base58
import typer
from bitcoin.core import Hash, Hash160
from coincurve import PublicKey

from paychan.protocol.address import encode_address, key_script
from paychan.protocol.keytree import HARDENED, Node
from paychan.protocol.types import Network, UnixTime
from signer.cli.options import CommandFailed, ConfigFile, PassphraseDescriptor, PassphraseFile, examples, or_exit
from signer.cli.terminal import say
from signer.config import SignerConfig, load_signer_config
from signer.keys.ring import CHANNEL_BRANCH, DEBUG_KEY, DESTINATION_BRANCH, KeySource, StaticKey
from signer.seed.open import config_with_seed, existing_seeds, passphrase_sources, trees

_VERSIONS = {Network.LIVE: 0x0488B21E}
"""BIP32's version bytes, which make the text begin with xpub or tpub."""

_TEST_VERSION = 0x043587CF
_NUMBERS_THAT_ARE_TIMES = range(500_000_000, 1 << 32)

_HARDENED_REVEALS = """\
These keys reveal whether two copies of a seed are the same, and nothing else. All keys below them are hardened: they lead
to no address, channel key or coin, not even together with leaked keys. So their only use is to check, in another wallet or
on another machine, whether the same words were restored. No extended key can watch the destinations:
watch settlement.destination_address instead, or get the address of one channel with `pubkey`."""

_RBPCP_REVEALS = """\
This key reveals the server key of every channel to any person who knows its client key and expiry, and so which settlements
are yours. Together with the private key of one channel it gives the root private key, and with that all coins.
Use it to derive the server keys of RBPCP v2 elsewhere (m/w1/w2/w3/w4). It does not lead to destinations or the reserve."""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    channel = "03da3afe4f58992a8cc909522c2ec859ef218fd92fda0a67c23fb40e0303030405 1900000000"
    app.command(epilog=examples(f"pubkey config/live/signer.toml {channel}"))(pubkey)
    lines = "export-xpub config/live/signer.toml", "export-xpub config/rbpcp/signer.toml --i-know-what-this-reveals"
    app.command("export-xpub", epilog=examples(*lines))(export_xpub)


def pubkey(
    file: ConfigFile,
    client_key: Annotated[
        str, typer.Argument(metavar="CLIENT_KEY", help="compressed, 66 hex digits", show_default=False)
    ],
    expiry: Annotated[
        int, typer.Argument(metavar="EXPIRY", help="expiry of the channel, Unix seconds", show_default=False)
    ],
    passphrase_fd: PassphraseDescriptor = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Show the server's key of a channel, and the destination of its settlement, from each generation of the seed."""

    def run() -> None:
        config = load_signer_config(file)
        key, time = _client_key(client_key), _expiry(expiry)
        if config.key.mode == "debug":
            _show(config, key, time, [("debug", StaticKey(DEBUG_KEY))])
            return
        config_with_seed(file)
        seeds = existing_seeds(config, passphrase_sources(config, passphrase_fd, passphrase_file))
        sources = trees(config, seeds)[: len(seeds)]
        _show(config, key, time, [(seed.fingerprint, source) for seed, source in zip(seeds, sources, strict=True)])

    or_exit(file, run)


def export_xpub(
    file: ConfigFile,
    reveals: Annotated[
        bool,
        typer.Option(
            "--i-know-what-this-reveals", help='show the key in key mode "rbpcp-v2" too, where it must stay secret'
        ),
    ] = False,
    passphrase_fd: PassphraseDescriptor = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Show the extended public keys (BIP32) of the seed, and what they reveal."""

    def run() -> None:
        config = config_with_seed(file)
        root_alone = config.key.mode == "rbpcp-v2"
        if root_alone and not reveals:
            msg = (
                'with key.mode = "rbpcp-v2", the extended public key and the private key of one channel together give '
                "the root private key. To show it anyway: --i-know-what-this-reveals"
            )
            raise CommandFailed(msg)
        paths: list[Sequence[int]] = [()] if root_alone else [(CHANNEL_BRANCH,), (DESTINATION_BRANCH,)]
        for seed in existing_seeds(config, passphrase_sources(config, passphrase_fd, passphrase_file)):
            for path in paths:
                origin = "".join(f"/{index & ~HARDENED}'" for index in path)
                key = extended_key(seed.root, path, Network(config.network))
                say(f"[{seed.fingerprint}{origin}]{key}")
        say("\n" + (_RBPCP_REVEALS if root_alone else _HARDENED_REVEALS))

    or_exit(file, run)


def extended_key(root: Node, path: Sequence[int], network: Network) -> str:
    """Serialize the public half of a node (BIP32, "Serialization format")."""
    node, parent, index = root, bytes(4), 0
    for index in path:
        parent = bytes(Hash160(node.key.public_key.format())[:4])
        node = node.child(index)
    payload = (
        _VERSIONS.get(network, _TEST_VERSION).to_bytes(4, "big")
        + bytes([len(path)])
        + parent
        + index.to_bytes(4, "big")
        + node.chain_code
        + node.key.public_key.format()
    )
    return str(bitcoin.base58.encode(payload + Hash(payload)[:4]))


def _show(config: SignerConfig, client_key: bytes, expiry: UnixTime, named: list[tuple[str, KeySource]]) -> None:
    for name, source in named:
        key = source.channel_key(client_key, expiry, create=False)
        derived = source.destination_key(client_key, expiry)
        payout = config.payout
        own = key_script(derived.public_key) if derived else b""
        script = payout.script(client_key, expiry) if payout else own
        say(name, "bold")
        say(f"  server key                          {key.public_key.hex() if key else 'none'}")
        for label, network in (("live", Network.LIVE), ("test and regtest", Network.TEST)):
            say(f"  {f'destination, {label}':34}  {encode_address(script, network) if script else 'none'}")


def _client_key(text: str) -> bytes:
    try:
        key = bytes.fromhex(text)
        if len(key) == 33:
            return PublicKey(key).format()
    except ValueError:
        pass
    msg = f"CLIENT_KEY: {text[:70]} is not a compressed public key, 66 hex digits that begin with 02 or 03"
    raise CommandFailed(msg)


def _expiry(number: int) -> UnixTime:
    if number not in _NUMBERS_THAT_ARE_TIMES:
        msg = f"EXPIRY: {number} is not a lock time in Unix seconds, {_NUMBERS_THAT_ARE_TIMES[0]} to {_NUMBERS_THAT_ARE_TIMES[-1]}"
        raise CommandFailed(msg)
    return UnixTime(number)
