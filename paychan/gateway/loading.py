"""Makes the price list that the settings of `[gateway]` name."""

from __future__ import annotations

from pathlib import Path

from paychan.config import Gateway
from paychan.gateway.prices import PriceList, one_price, parse_prices
from paychan.protocol.settings import SettingsError
from paychan.protocol.types import Sat


def load_prices(settings: Gateway, source: str) -> PriceList:
    """Read the price list, or make the one of a first try. Waits for the disk.

    Args:
        settings: `[gateway]`, which must be on.
        source: name of the server's settings file, for errors.

    Raises:
        SettingsError: the file is not readable, or its content is wrong.
    """
    if not settings.prices:
        return one_price(settings.upstream, Sat(settings.price_sat), source)
    try:
        text = Path(settings.prices).read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(settings.prices, "", f"can't be read (gateway.prices of {source}): {error}") from None
    return parse_prices(text, settings.prices)
