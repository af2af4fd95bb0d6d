"""A missing seed file: no other seed is created in its place if coins may depend on the old one."""

from __future__ import annotations

from pathlib import Path

import pytest

from paychan.protocol.settings import SettingsError
from signer.config import load_signer_config
from signer.seed.file import SeedError
from signer.seed.open import open_seeds, passphrase_sources
from tests.signer.place import WORD, Place, private, run
from tests.signer.test_seed import config


def test_fault_74_no_seed_is_created_by_a_setting_on_the_live_network(tmp_path: Path) -> None:
    """On the live network the setting that creates a seed is refused in every mode, with the remedy."""
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
def test_fault_74_no_seed_is_created_beside_traces_of_a_signer(tmp_path: Path, trace: str, is_link: bool) -> None:
    """With a ledger, a log or an archived log, keys exist: `run` and `init` create no others, and name the remedy."""
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
    result = run(place, "init", "--destination", "seed", "--words-file", str(tmp_path / "words"))

    assert result.status == 2
    assert f"recover {place.file}" in result.output
    assert sorted({*tmp_path.iterdir()} - {place.file}) == [each for each in before if each != place.file]
