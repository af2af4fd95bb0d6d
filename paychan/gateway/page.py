"""The page that a browser gets in place of a problem body: price, place of the channel as QR code, and code that pays.

It loads nothing and runs nothing. Every text in it is escaped; `POLICY` allows its one style sheet alone.
"""

from __future__ import annotations

import re
from base64 import b64encode
from functools import lru_cache
from hashlib import sha256
from html import escape

import segno

from paychan.protocol.wire.offers import Offer

URL_PLACE = b"\x00URL\x00"
"""Stands for the URL of the request, until `filled`; no escaped text contains it."""

_UNITS = {
    "request": "for each request",
    "byte": "for each byte",
    "kilobyte": "for each kilobyte",
    "second": "for each second",
    "event": "for each event",
    "token": "for each request, by the number of its tokens",
}


def in_words(offer: Offer, *, is_ceiling: bool) -> str:
    """Return the price as a person says it."""
    return f"{'at most ' if is_ceiling else ''}{offer.amount_sat:,} satoshi {_UNITS[offer.unit]}"


_UNSAFE = re.compile(r"[^A-Za-z0-9\-._~:/?#\[\]@!()*+,;=%&]")
"""Characters of a URL that mean something in HTML, a shell or a Python text, and those that no URL has."""

_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--dim:#59636e;--back:#f4f5f7;--card:#fff;--line:#d9dde2;--code:#f0f2f5;--mark:#a84300}
@media (prefers-color-scheme:dark){:root{--ink:#e8eaed;--dim:#a2abb5;--back:#111418;--card:#1b1f25;--line:#343b44;--code:#12161b;--mark:#ffa657}}
*{box-sizing:border-box}
body{margin:0;padding:1.5rem 1rem;background:var(--back);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:52rem;margin:0 auto;padding:1.5rem;background:var(--card);border:1px solid var(--line);border-radius:12px}
.realm{margin:0;color:var(--dim);overflow-wrap:anywhere}
h1{margin:.2rem 0 .6rem;font-size:2rem;line-height:1.2}
h1 b{color:var(--mark)}
h1 small{display:inline-block;font-size:1rem;font-weight:400;color:var(--dim)}
h2{margin:1.4rem 0 .4rem;font-size:1rem}
p{margin:.4rem 0;overflow-wrap:anywhere}
pre{margin:0;padding:.8rem;background:var(--code);border:1px solid var(--line);border-radius:8px;white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.6 ui-monospace,monospace}
.pay{display:flex;flex-wrap:wrap;gap:1rem 1.4rem;align-items:center;margin-top:1.4rem}
.pay div{flex:1 1 15rem;min-width:0}
.pay svg{flex:none;width:9.5rem;height:9.5rem;background:#fff;border-radius:8px}
a{color:inherit}
code{white-space:nowrap}
.note{font-size:.875rem;color:var(--dim)}
"""

POLICY = (
    f"default-src 'none'; style-src 'sha256-{b64encode(sha256(_STYLE.encode()).digest()).decode()}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Value of `Content-Security-Policy`."""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="robots" content="noindex"><title>{price} satoshi · {realm}</title><style>{style}</style></head>
<body><main>
<p class="realm">{realm}</p>
<h1>{most}<b>{price} satoshi</b> <small>{unit}</small></h1>
{description}
<h2>Command line</h2>
<pre>pip install paychan
paychan pay --max {amount} '{url}'</pre>
<h2>Python</h2>
<pre>{python}</pre>
<div class="pay">{code}<div><h2>Where a channel is opened</h2>
<p><a href="{pay_url}" rel="nofollow noreferrer">{pay_url}</a></p>
<p class="note">A payment channel on the Bitcoin network “{network}” pays any number of requests. It holds at least
{open_price} satoshi and counts after {confirmations}. The money that you do not spend stays yours.
<code>paychan pay --open</code> opens a channel if you have none.</p></div></div>
<p class="note">Programs read this price in the headers PAYMENT-REQUIRED (x402) and WWW-Authenticate (MPP) of this answer.</p>
</main></body></html>
"""

_PYTHON = """from paychan.client.paying.budget import Budget
from paychan.client.paying.clients import paid_client
answer = paid_client(Budget(per_request={amount})).get("{url}")"""


def page(offer: Offer, *, is_ceiling: bool) -> bytes:
    """Build the page of an offer, with `URL_PLACE` where the URL of the request belongs."""
    confirmations = offer.min_confirmations
    amount, mark = str(offer.amount_sat), URL_PLACE.decode()
    shown = _PAGE.format(
        price=f"{offer.amount_sat:,}",
        most="At most " if is_ceiling else "",
        amount=amount,
        unit=_UNITS[offer.unit],
        realm=escape(offer.realm),
        description=f"<p>{escape(offer.description)}</p>" if offer.description else "",
        style=_STYLE,
        url=mark,
        python=escape(_PYTHON.format(amount=amount, url=mark), quote=False),
        code=qr_code(offer.pay_url),
        pay_url=escape(offer.pay_url),
        network=escape(offer.network),
        open_price=f"{offer.open_price_sat:,}",
        confirmations=f"{confirmations} confirmation{'' if confirmations == 1 else 's'}"
        if confirmations
        else "no wait",
    )
    return shown.encode()


def filled(template: bytes, url: str) -> bytes:
    """Write the URL of a request into a page; what HTML, a shell or Python could misread is percent-encoded."""
    plain = _UNSAFE.sub(lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode("utf8", "replace")), url)
    return template.replace(URL_PLACE, escape(plain).encode())


@lru_cache(16)
def qr_code(text: str) -> str:
    """Return a QR code as an SVG element, dark on light in every colour scheme: readers need that."""
    return str(
        segno.make(text, error="m").svg_inline(border=3, dark="#000", light="#fff", omitsize=True, svgclass=None)
    )
