"""The repository's pages, and their tables generated from the code.

`python -m tests.lib.readme` writes these tables.
"""

from __future__ import annotations

import re
from pathlib import Path

from paychan.api.stream.session import CLOSE_CODES
from paychan.config import ServerConfig
from paychan.gateway.pricefile import PriceFile, RouteTable
from paychan.protocol import unpaid  # noqa: F401 - enters its codes into the table
from paychan.protocol.errors import PaychanError
from paychan.protocol.settings import settings_table
from paychan.shared.configfiles import NETWORKS
from signer.config import SignerConfig
from signer.judge.policies import OTHER_POLICIES, POLICIES

ROOT = Path(__file__).parents[2]
PAGES = [
    *(
        ROOT / name
        for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")
        if (ROOT / name).exists()
    ),
    *sorted(
        path
        for top in ("actors", "bench", "config", "paychan", "signer", "tests")
        for path in ROOT.glob(f"{top}/**/*.md")
    ),
]
"""Return every page of the repository: first those of the root, then those of the folders."""


def _settings(table: type) -> str:
    rows = ["| key | default | unit | meaning |", "|---|---|---|---|"]
    rows += [f"| `{row.key}` | `{row.default}` | {row.unit} | {row.doc} |" for row in settings_table(table)]
    return "\n".join(rows)


def _errors() -> str:
    rows = ["| status | close code | code | text |", "|---|---|---|---|"]
    kinds = sorted(PaychanError.table.values(), key=lambda kind: (kind.http_status, kind.code))
    rows += [
        f"| {kind.http_status} | {CLOSE_CODES + kind.http_status} | `{kind.code}` | {kind.public_text or kind.text} |"
        for kind in kinds
    ]
    return "\n".join(rows)


def _policies() -> str:
    rows = ["| tag | rule |", "|---|---|"]
    told = [(tag, (rule.__doc__ or "").splitlines()[0].partition(": ")[2].rstrip(".")) for tag, rule in POLICIES]
    rows += [f"| `{tag}` | {text} |" for tag, text in (*told, *OTHER_POLICIES)]
    return "\n".join(rows)


SECTIONS = {
    "server settings": lambda: _settings(ServerConfig),
    "price list": lambda: _settings(PriceFile),
    "routes of the price list": lambda: _settings(RouteTable),
    "signer settings": lambda: _settings(SignerConfig),
    "errors": _errors,
    "signer policies": _policies,
}


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name}: generated -->\n)(.*?\n?)(<!-- end -->)", re.DOTALL)


def in_pages(name: str) -> list[str]:
    """Return the table in the form of each page that has its marker."""
    return [found[2].removesuffix("\n") for page in PAGES for found in _pattern(name).finditer(page.read_text())]


def with_comments(text: str, table: type) -> str:
    """Return a settings file with the declared description and unit as the comment of each key."""
    rows = {row.key: row for row in settings_table(table)}
    section, lines = "", list[str]()
    for line in text.splitlines():
        if found := re.match(r"\[(\w+)\]", line):
            section = f"{found[1]}."
        elif found := re.match(r"(\w+) = ", line):
            row = rows[section + found[1]]
            line = f"{line.partition(' # ')[0]} # {row.doc}" + (f" ({row.unit})" if row.unit else "")  # noqa: PLW2901
        lines.append(line)
    return "\n".join(lines) + "\n"


SHIPPED = {
    ROOT / "config" / network / file: table
    for network in NETWORKS
    for file, table in (("server.toml", ServerConfig), ("signer.toml", SignerConfig))
}
"""The shipped settings, each with the table that declares them."""


def main() -> None:
    """Write all tables into the pages with their markers, and the comments of the shipped settings."""
    for file, table in SHIPPED.items():
        file.write_text(with_comments(file.read_text(), table))
    for page in PAGES:
        before = text = page.read_text()
        for name, make in SECTIONS.items():
            text = _pattern(name).sub(lambda found, make=make: found[1] + make() + "\n" + found[3], text)
        if text != before:
            page.write_text(text)


if __name__ == "__main__":
    main()
