"""Post-quantum key exchange: what this process offers in its ClientHello, and what a server chose in its ServerHello.

Python before 3.15 cannot be asked for groups, so the two messages are read. They are the only plaintext of TLS 1.3.
Source: RFC 8446, sections 4.1.2, 4.1.3, 4.2.7 and 4.2.8; the group's number is IANA's for X25519MLKEM768.
"""

from __future__ import annotations

import ssl
import struct
from contextlib import suppress

__all__ = ["X25519MLKEM768", "chosen_group", "group_name", "offers_hybrid"]

X25519MLKEM768 = 0x11EC
_NAMES = {0x11EC: "X25519MLKEM768", 0x001D: "X25519", 0x0017: "P-256", 0x0018: "P-384", 0x0019: "P-521", 0x001E: "X448"}
_SUPPORTED_GROUPS, _KEY_SHARE = 10, 51
_CLIENT_HELLO, _SERVER_HELLO = 1, 2


def group_name(group: int) -> str:
    """A group's name, or its number in hexadecimal."""
    return _NAMES.get(group, f"{group:#06x}")


def offers_hybrid() -> bool:
    """Whether the linked OpenSSL offers X25519MLKEM768 by default: asked of a real ClientHello, sent to nobody."""
    out = ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), out, server_hostname="localhost").do_handshake()
    record = out.read()
    groups = _extension(record[5:], _CLIENT_HELLO, _SUPPORTED_GROUPS)
    return X25519MLKEM768 in [code for (code,) in struct.iter_unpack(">H", groups[2 : 2 + (len(groups) - 2) // 2 * 2])]


def chosen_group(server_hello: bytes) -> int | None:
    """The group of a ServerHello, given from its handshake header on; None when it says none or is no ServerHello."""
    share = _extension(server_hello, _SERVER_HELLO, _KEY_SHARE)
    return int.from_bytes(share[:2], "big") if len(share) >= 2 else None


def _extension(message: bytes, kind: int, wanted: int) -> bytes:
    """The body of one extension; empty when the message is another or cut short."""
    try:
        if message[0] != kind:
            return b""
        at = 4 + 2 + 32
        at += 1 + message[at]  # The session's name.
        if kind == _CLIENT_HELLO:
            at += 2 + int.from_bytes(message[at : at + 2], "big")  # Cipher suites.
            at += 1 + message[at]  # Compression methods.
        else:
            at += 3
        end = at + 2 + int.from_bytes(message[at : at + 2], "big")
        at += 2
        while at + 4 <= min(end, len(message)):
            code, size = struct.unpack_from(">HH", message, at)
            if code == wanted:
                return message[at + 4 : at + 4 + size]
            at += 4 + size
    except (IndexError, struct.error):
        pass
    return b""
