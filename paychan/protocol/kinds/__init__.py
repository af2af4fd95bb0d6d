"""Channel kinds; each is one file and one line here."""

from paychan.protocol.kinds.base import register
from paychan.protocol.kinds.p2sh import P2SH

register(P2SH)
