"""Numbers of PKCS#11 that this package uses, under the names of the standard."""

from __future__ import annotations

from enum import IntEnum


class Attribute(IntEnum):
    """CKA_…"""

    CLASS = 0x0
    TOKEN = 0x1
    PRIVATE = 0x2
    LABEL = 0x3
    VALUE = 0x11
    KEY_TYPE = 0x100
    ID = 0x102
    SENSITIVE = 0x103
    ENCRYPT = 0x104
    DECRYPT = 0x105
    WRAP = 0x106
    UNWRAP = 0x107
    SIGN = 0x108
    VERIFY = 0x10A
    DERIVE = 0x10C
    EXTRACTABLE = 0x162
    LOCAL = 0x163
    NEVER_EXTRACTABLE = 0x164
    ALWAYS_SENSITIVE = 0x165
    MODIFIABLE = 0x170
    EC_PARAMS = 0x180
    EC_POINT = 0x181


class ObjectClass(IntEnum):
    """CKO_…"""

    PUBLIC_KEY = 2
    PRIVATE_KEY = 3


class KeyType(IntEnum):
    """CKK_…"""

    EC = 3


class Mechanism(IntEnum):
    """CKM_…"""

    EC_KEY_PAIR_GEN = 0x1040
    ECDSA = 0x1041


class Code(IntEnum):
    """CKR_…: codes that are handled here or that an operator is likely to see; other codes are shown as numbers."""

    OK = 0x0
    GENERAL_ERROR = 0x5
    FUNCTION_FAILED = 0x6
    CANT_LOCK = 0xA
    ATTRIBUTE_READ_ONLY = 0x10
    ATTRIBUTE_SENSITIVE = 0x11
    ATTRIBUTE_TYPE_INVALID = 0x12
    ATTRIBUTE_VALUE_INVALID = 0x13
    DEVICE_ERROR = 0x30
    DEVICE_MEMORY = 0x31
    DEVICE_REMOVED = 0x32
    KEY_HANDLE_INVALID = 0x60
    MECHANISM_INVALID = 0x70
    OBJECT_HANDLE_INVALID = 0x82
    OPERATION_ACTIVE = 0x90
    PIN_INCORRECT = 0xA0
    PIN_INVALID = 0xA1
    PIN_LEN_RANGE = 0xA2
    PIN_EXPIRED = 0xA3
    PIN_LOCKED = 0xA4
    SESSION_CLOSED = 0xB0
    SESSION_COUNT = 0xB1
    SESSION_HANDLE_INVALID = 0xB3
    SIGNATURE_INVALID = 0xC0
    TEMPLATE_INCONSISTENT = 0xD1
    TOKEN_NOT_PRESENT = 0xE0
    TOKEN_NOT_RECOGNIZED = 0xE1
    TOKEN_WRITE_PROTECTED = 0xE2
    USER_ALREADY_LOGGED_IN = 0x100
    USER_NOT_LOGGED_IN = 0x101
    USER_PIN_NOT_INITIALIZED = 0x102
    DOMAIN_PARAMS_INVALID = 0x130
    CURVE_NOT_SUPPORTED = 0x140
    BUFFER_TOO_SMALL = 0x150
    CRYPTOKI_NOT_INITIALIZED = 0x190
    CRYPTOKI_ALREADY_INITIALIZED = 0x191


class CryptokiError(Exception):
    """A call failed. `code` is a `Code`, or a number without a name here."""

    def __init__(self, code: int, function: str) -> None:
        known = code in Code.__members__.values()
        super().__init__(f"{function}: {f'CKR_{Code(code).name}' if known else f'error 0x{code:x}'}")
        self.code = code
