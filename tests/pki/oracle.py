"""The openssl program as the oracle: it shares no code with this package, nor with `cryptography`'s parsers in Python."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl program is the oracle")
PURPOSE = {"client": "sslclient", "server": "sslserver"}


def openssl(*arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, input=stdin, check=False, timeout=30)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def verdict(folder: Path, role: str, *more: object) -> str:
    """What `openssl verify` says of a party's folder by its own ca.pem and crl.pem: "OK", or its complaint.

    Strict, for the role's purpose, every link of the chain checked for revocation.
    """
    said = openssl(
        "verify", "-x509_strict", "-purpose", PURPOSE[role], "-crl_check_all", "-CRLfile", folder / "crl.pem",
        "-no-CApath", "-no-CAstore", "-CAfile", folder / "ca.pem", *more, folder / "cert.pem",
    )  # fmt: skip
    if said.returncode == 0:
        assert said.stdout.strip().endswith(": OK")
        return "OK"
    return said.stdout + said.stderr
