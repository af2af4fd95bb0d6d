"""The part of PKCS#11 that signing needs: calls a token's library through ctypes. It knows no channels and no retries.

It replaces the existing bindings. PyKCS11 holds the interpreter's lock during every call, so one call that hangs stops
the whole process. python-pkcs11 (0.10.1, tried with SoftHSM 2.6.1) releases that lock, but calls C_Initialize without
CKF_OS_LOCKING_OK: four threads, each with a session of its own, end in a segmentation fault within a second. It also
takes the PIN as text, which can't be wiped, and loses the number of an error that it does not know. It is no faster: a
signature costs 0.42 ms of CPU either way, nearly all of it SoftHSM's. Here every call releases the interpreter's lock,
and the library is initialised for calls by threads.

A `Session` is used by one thread at a time; different sessions may be used by different threads. All methods raise
`CryptokiError`. Structures are packed as on Unix; Windows packs them differently.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from ctypes import POINTER, byref, c_char, c_char_p, c_ubyte, c_ulong, c_void_p
from typing import NamedTuple

from signer.token.constants import Attribute, Code, CryptokiError, Mechanism

Attributes = Mapping[Attribute, bytes | bool | int]
"""Attributes that a key has, that a search matches, or that a new key gets."""

_USER = 1  # CKU_USER
_RW_SERIAL_SESSION = 2 | 4  # CKF_RW_SESSION | CKF_SERIAL_SESSION
_OS_LOCKING_OK = 2  # CKF_OS_LOCKING_OK
_UNAVAILABLE = c_ulong(-1).value  # CK_UNAVAILABLE_INFORMATION
_MOST_ATTRIBUTE_BYTES = 256
_MOST_SIGNATURE_BYTES = 256
_FOUND_AT_ONCE = 512
_MOST_SLOTS = 1024


class TokenInfo(NamedTuple):
    """A token's description of itself."""

    slot: int
    label: str
    maker: str
    model: str


class _Attribute(ctypes.Structure):
    _fields_ = (("type", c_ulong), ("value", c_void_p), ("size", c_ulong))


class _Mechanism(ctypes.Structure):
    _fields_ = (("mechanism", c_ulong), ("parameter", c_void_p), ("size", c_ulong))


class _InitializeArguments(ctypes.Structure):
    _fields_ = (("mutexes", c_void_p * 4), ("flags", c_ulong), ("reserved", c_void_p))


class _Version(ctypes.Structure):
    _fields_ = (("major", c_ubyte), ("minor", c_ubyte))


class _TokenInfo(ctypes.Structure):
    _fields_ = (
        ("label", c_char * 32),
        ("maker", c_char * 32),
        ("model", c_char * 16),
        ("serial_number", c_char * 16),
        ("flags", c_ulong),
        ("counts", c_ulong * 10),
        ("versions", _Version * 2),
        ("time", c_char * 16),
    )


class _FunctionList(ctypes.Structure):
    _fields_ = (("version", _Version), ("functions", c_void_p * 68))


_ULONGS = POINTER(c_ulong)
_ATTRIBUTES = POINTER(_Attribute)
_MECHANISM = POINTER(_Mechanism)
_FUNCTIONS = {
    "C_Initialize": (0, (c_void_p,)),
    "C_GetSlotList": (4, (c_ubyte, _ULONGS, _ULONGS)),
    "C_GetTokenInfo": (6, (c_ulong, POINTER(_TokenInfo))),
    "C_GetMechanismInfo": (8, (c_ulong, c_ulong, _ULONGS)),
    "C_OpenSession": (12, (c_ulong, c_ulong, c_void_p, c_void_p, _ULONGS)),
    "C_CloseSession": (13, (c_ulong,)),
    "C_CloseAllSessions": (14, (c_ulong,)),
    "C_Login": (18, (c_ulong, c_ulong, c_void_p, c_ulong)),
    "C_DestroyObject": (22, (c_ulong, c_ulong)),
    "C_GetAttributeValue": (24, (c_ulong, c_ulong, _ATTRIBUTES, c_ulong)),
    "C_FindObjectsInit": (26, (c_ulong, _ATTRIBUTES, c_ulong)),
    "C_FindObjects": (27, (c_ulong, _ULONGS, c_ulong, _ULONGS)),
    "C_FindObjectsFinal": (28, (c_ulong,)),
    "C_SignInit": (42, (c_ulong, _MECHANISM, c_ulong)),
    "C_Sign": (43, (c_ulong, c_char_p, c_ulong, c_void_p, _ULONGS)),
    "C_GenerateKeyPair": (59, (c_ulong, _MECHANISM, _ATTRIBUTES, c_ulong, _ATTRIBUTES, c_ulong, _ULONGS, _ULONGS)),
}
"""Place in CK_FUNCTION_LIST, whose order all versions keep, and arguments."""

_ECDSA = _Mechanism(Mechanism.ECDSA, None, 0)
_EC_KEY_PAIR_GEN = _Mechanism(Mechanism.EC_KEY_PAIR_GEN, None, 0)


class Library:
    """A PKCS#11 library, loaded and initialised. Never finalised: other code in this process may share it.

    Raises:
        OSError: there is no such library, or it is not PKCS#11.
    """

    def __init__(self, path: str) -> None:
        table = POINTER(_FunctionList)()
        try:
            get_function_list = ctypes.CDLL(path).C_GetFunctionList
        except AttributeError:
            msg = f"{path} has no C_GetFunctionList"
            raise OSError(msg) from None
        get_function_list.restype = c_ulong
        _check("C_GetFunctionList", get_function_list(byref(table)))
        self._functions: dict[str, Callable[..., int]] = {
            name: ctypes.CFUNCTYPE(c_ulong, *types)(table.contents.functions[place] or 0)
            for name, (place, types) in _FUNCTIONS.items()
        }
        self.threads = True
        self.initialize()

    def call(self, function: str, *arguments: object) -> None:
        """Call a function of the library; results are written to the arguments."""
        _check(function, self._functions[function](*arguments))

    def initialize(self) -> None:
        """Initialise the library, again if other code finalised it. `threads`: whether threads may call it at once."""
        arguments = _InitializeArguments(flags=_OS_LOCKING_OK)
        code = self._functions["C_Initialize"](byref(arguments))
        if code == Code.CANT_LOCK:
            self.threads = False
            code = self._functions["C_Initialize"](None)
        if code != Code.CRYPTOKI_ALREADY_INITIALIZED:
            _check("C_Initialize", code)

    def tokens(self) -> list[TokenInfo]:
        """List the tokens that are present."""
        slots, count = (c_ulong * _MOST_SLOTS)(), c_ulong(_MOST_SLOTS)
        self.call("C_GetSlotList", 1, slots, byref(count))
        infos = (self._token(slot) for slot in slots[: count.value])
        return [info for info in infos if info is not None]

    def supports(self, slot: int, mechanism: Mechanism) -> bool:
        """Say whether a token offers a mechanism."""
        sizes_and_flags = (c_ulong * 3)()
        try:
            self.call("C_GetMechanismInfo", slot, mechanism, sizes_and_flags)
        except CryptokiError as error:
            if error.code == Code.MECHANISM_INVALID:
                return False
            raise
        return True

    def open_session(self, slot: int) -> Session:
        """Open a session that may make keys."""
        handle = c_ulong()
        self.call("C_OpenSession", slot, _RW_SERIAL_SESSION, None, None, byref(handle))
        return Session(self, handle.value)

    def _token(self, slot: int) -> TokenInfo:
        info = _TokenInfo()
        self.call("C_GetTokenInfo", slot, byref(info))
        return TokenInfo(
            slot, *(raw.decode(errors="replace").rstrip(" \0") for raw in (info.label, info.maker, info.model))
        )


class Session:
    """One session, for one thread at a time: only one of its signatures can be in progress."""

    __slots__ = ("_handle", "_library", "_signature")

    def __init__(self, library: Library, handle: int) -> None:
        self._library = library
        self._handle = handle
        self._signature = ctypes.create_string_buffer(_MOST_SIGNATURE_BYTES)

    def login(self, pin: bytearray) -> None:
        """Log the whole process in, as the token's user. Makes no copy of the PIN."""
        raw = (c_char * len(pin)).from_buffer(pin) if pin else None
        self._library.call("C_Login", self._handle, _USER, raw, len(pin))

    def close(self) -> None:
        """Close the session."""
        self._library.call("C_CloseSession", self._handle)

    def sign(self, key: int, digest: bytes) -> bytes:
        """Sign 32 bytes with CKM_ECDSA; returns r and s, 32 bytes each."""
        size = c_ulong(_MOST_SIGNATURE_BYTES)
        self._library.call("C_SignInit", self._handle, _ECDSA, key)
        self._library.call("C_Sign", self._handle, digest, len(digest), self._signature, byref(size))
        return ctypes.string_at(self._signature, size.value)

    def find(self, wanted: Attributes) -> list[int]:
        """List the handles of all objects that have these attributes."""
        template, _buffers = _template(wanted)
        found, count = (c_ulong * _FOUND_AT_ONCE)(), c_ulong()
        handles: list[int] = []
        self._library.call("C_FindObjectsInit", self._handle, template, len(template))
        try:
            while True:
                self._library.call("C_FindObjects", self._handle, found, _FOUND_AT_ONCE, byref(count))
                if not count.value:
                    return handles
                handles += found[: count.value]
        finally:
            self._library.call("C_FindObjectsFinal", self._handle)

    def read(self, handle: int, wanted: Sequence[Attribute]) -> list[bytes | None]:
        """Read attributes of an object, in this order; None for one that it lacks or does not reveal."""
        buffers = [ctypes.create_string_buffer(_MOST_ATTRIBUTE_BYTES) for _ in wanted]
        template = (_Attribute * len(wanted))(
            *(
                _Attribute(kind, ctypes.addressof(buffer), len(buffer))
                for kind, buffer in zip(wanted, buffers, strict=True)
            )
        )
        try:
            self._library.call("C_GetAttributeValue", self._handle, handle, template, len(template))
        except CryptokiError as error:
            if error.code not in (Code.ATTRIBUTE_SENSITIVE, Code.ATTRIBUTE_TYPE_INVALID):
                raise
        return [
            None if attribute.size == _UNAVAILABLE else buffer.raw[: attribute.size]
            for attribute, buffer in zip(template, buffers, strict=True)
        ]

    def generate(self, public: Attributes, private: Attributes) -> tuple[int, int]:
        """Make a key pair with CKM_EC_KEY_PAIR_GEN; return the handles of the public and the private key."""
        (public_template, _public), (private_template, _private) = _template(public), _template(private)
        handles = c_ulong(), c_ulong()
        self._library.call(
            "C_GenerateKeyPair",
            self._handle,
            _EC_KEY_PAIR_GEN,
            public_template,
            len(public_template),
            private_template,
            len(private_template),
            *map(byref, handles),
        )
        return handles[0].value, handles[1].value

    def destroy(self, handle: int) -> None:
        """Remove an object from the token."""
        self._library.call("C_DestroyObject", self._handle, handle)


def _template(attributes: Attributes) -> tuple[ctypes.Array[_Attribute], list[ctypes.Array[c_char]]]:
    """Convert attributes to PKCS#11's form. The buffers must live as long as the array is used."""
    buffers = [ctypes.create_string_buffer(raw, len(raw)) for raw in map(_raw, attributes.values())]
    rows = [
        _Attribute(kind, ctypes.addressof(buffer), len(buffer))
        for kind, buffer in zip(attributes, buffers, strict=True)
    ]
    return (_Attribute * len(rows))(*rows), buffers


def _raw(value: bytes | bool | int) -> bytes:
    if isinstance(value, bool):
        return bytes([value])  # CK_BBOOL
    return bytes(c_ulong(value)) if isinstance(value, int) else value


def _check(function: str, code: int) -> None:
    if code != Code.OK:
        raise CryptokiError(code, function)
