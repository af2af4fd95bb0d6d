"""`paychan settings`: all settings of a server with their values, the defaults and what each means."""

from __future__ import annotations

from paychan.cli.options import ConfigFile
from paychan.cli.terminal import JsonOption, fail, show_json, show_table
from paychan.shared.layout import Column

EXAMPLES = "[bold]Examples[/bold]\n\n  paychan settings live\n\n  paychan settings debug --json"


def settings(
    file: ConfigFile,
    as_json: JsonOption = False,
) -> None:
    """Show all settings of a server: the value in use, the default, unit and meaning of each."""
    from paychan.config import ServerConfig, load_server_config
    from paychan.protocol.settings import SettingsError, settings_table, settings_values

    try:
        values = settings_values(load_server_config(file))
    except SettingsError as error:
        fail(str(error), status=2)
    if as_json:
        show_json(values)
        return
    rows = [
        (row.key, row.shown(values[row.key]), row.default, row.unit, row.doc) for row in settings_table(ServerConfig)
    ]
    show_table([Column(title) for title in ("key", "value", "default", "unit", "meaning")], rows)
