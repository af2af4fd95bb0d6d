"""`paychan-signer settings`: all settings of a signer with their values, the defaults and what each means."""

from __future__ import annotations

from paychan.protocol.settings import SettingsError, settings_table, settings_values
from paychan.shared.layout import Column
from signer.cli.options import ConfigFile
from signer.cli.terminal import JsonOption, fail, show_json, show_table
from signer.config import SignerConfig, load_signer_config


def settings(
    file: ConfigFile,
    as_json: JsonOption = False,
) -> None:
    """Show all settings of the signer: the value in use, the default, unit and meaning of each."""
    try:
        values = settings_values(load_signer_config(file))
    except SettingsError as error:
        fail(str(error), 2)
    if as_json:
        show_json(values)
        return
    rows = [
        (row.key, row.shown(values[row.key]), row.default, row.unit, row.doc) for row in settings_table(SignerConfig)
    ]
    show_table([Column(title) for title in ("key", "value", "default", "unit", "meaning")], rows)
