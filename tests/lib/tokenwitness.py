"""Try to extract private keys from a token, through another PKCS#11 binding than the signer's, and report the results.

`python -m tests.lib.tokenwitness MODULE TOKEN PIN` writes JSON: for each private key the result of each method.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import PyKCS11


def main(module: str, label: str, pin: str) -> None:
    """Write the result of each attempt on each private key."""
    library = PyKCS11.PyKCS11Lib().load(module)
    slot = next(slot for slot in library.getSlotList() if library.getTokenInfo(slot).label.strip("\0 ") == label)
    session = library.openSession(slot, PyKCS11.CKF_RW_SESSION)
    session.login(pin)
    wrapping_key = session.generateKey(
        [
            (PyKCS11.CKA_CLASS, PyKCS11.CKO_SECRET_KEY),
            (PyKCS11.CKA_KEY_TYPE, PyKCS11.CKK_AES),
            (PyKCS11.CKA_TOKEN, PyKCS11.CK_FALSE),
            (PyKCS11.CKA_WRAP, PyKCS11.CK_TRUE),
            (PyKCS11.CKA_ENCRYPT, PyKCS11.CK_TRUE),
            (PyKCS11.CKA_VALUE_LEN, 32),
        ],
        PyKCS11.MechanismAESGENERATEKEY,
    )
    wrapping = PyKCS11.Mechanism(PyKCS11.CKM_AES_KEY_WRAP_PAD)
    keys = session.findObjects([(PyKCS11.CKA_CLASS, PyKCS11.CKO_PRIVATE_KEY)])
    print(json.dumps([attempts(session, key, wrapping_key, wrapping) for key in keys]))


def attempts(session: Any, key: Any, wrapping_key: Any, wrapping: Any) -> dict[str, Any]:
    """Return the result of each method: an error's name, or a value."""
    (label,) = session.getAttributeValue(key, [PyKCS11.CKA_LABEL])
    flags = (
        PyKCS11.CKA_SENSITIVE,
        PyKCS11.CKA_EXTRACTABLE,
        PyKCS11.CKA_ALWAYS_SENSITIVE,
        PyKCS11.CKA_NEVER_EXTRACTABLE,
        PyKCS11.CKA_LOCAL,
    )
    return {
        "label": label,
        "flags": session.getAttributeValue(key, flags),
        "value": session.getAttributeValue(key, [PyKCS11.CKA_VALUE])[0],
        "wrapped": _outcome(lambda: bytes(session.wrapKey(wrapping_key, key, wrapping)).hex()),
        "made extractable": _outcome(
            lambda: session.setAttributeValue(key, [(PyKCS11.CKA_EXTRACTABLE, PyKCS11.CK_TRUE)])
        ),
        "made readable": _outcome(lambda: session.setAttributeValue(key, [(PyKCS11.CKA_SENSITIVE, PyKCS11.CK_FALSE)])),
    }


def _outcome(attempt: Callable[[], Any]) -> Any:
    try:
        return attempt()
    except PyKCS11.PyKCS11Error as error:
        return PyKCS11.CKR[error.value]


if __name__ == "__main__":
    main(*sys.argv[1:])
