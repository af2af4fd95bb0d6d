"""A seed file that is missing: another seed is never drawn in its place where coins may depend on the old one."""

from __future__ import annotations

from pathlib import Path

import pytest

from paychan.protocol.settings import SettingsError
from signer.config import load_signer_config
from signer.seed.file import SeedError
from signer.seed.open import open_seeds, passphrase_sources
from tests.signer.place import WORD, Place, private, run
from tests.signer.test_seed import config


def test_fault_74_no_seed_is_drawn_unasked_on_the_live_network(tmp_path: Path) -> None:
    """The setting that draws one is refused there, whatever else is configured, with what to do instead."""
    file = tmp_path / "signer.toml"
    for mode in ("hardened", "rbpcp-v2", "pkcs11"):
        file.write_text(
            f'network = "live"\nstate_dir = "{tmp_path}"\n[key]\nmode = "{mode}"\ncreate_if_missing = true\n'
        )

        with pytest.raises(SettingsError, match=r"paychan-signer init FILE") as refused:
            load_signer_config(file)
        assert refused.value.key == "key.create_if_missing"


@pytest.mark.parametrize("trace", ["signer.ledger", "signer.audit", "signer.audit.1-90", "signer.audit.broken-7"])
@pytest.mark.parametrize("is_link", [False, True])
def test_fault_74_no_seed_is_drawn_where_a_signer_has_been(tmp_path: Path, trace: str, is_link: bool) -> None:
    """Ledger, log or an archived log say that keys exist: `run` and `init` draw no others, and say what to do."""
    settings = config(tmp_path, 'mode = "hardened"\ncreate_if_missing = true')
    if is_link:
        (tmp_path / trace).symlink_to("nowhere")
    else:
        (tmp_path / trace).mkdir()
    before = sorted(tmp_path.iterdir())

    with pytest.raises(SeedError, match=rf"{trace} of a signer that had one.*recover FILE"):
        open_seeds(settings, passphrase_sources(settings))
    place = Place(tmp_path / "signer.toml", settings.seed_path, private(tmp_path.parent / f"p{is_link}{trace}", WORD))
    place.file.write_text(f'network = "live"\nstate_dir = "{tmp_path}"\n[key]\nmode = "hardened"\n')
    said = run(place, "init", "--words-file", str(tmp_path / "words"))

    assert said.status == 2
    assert "recover FILE" in said.output
    assert sorted({*tmp_path.iterdir()} - {place.file}) == [each for each in before if each != place.file]
