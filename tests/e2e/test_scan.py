"""What a stranger's tools find at the listening server: `openssl s_client` always, sslyze where its own environment is named.

sslyze holds back `cryptography`, so it is never installed beside the product:

    python -m venv /tmp/sslyze && /tmp/sslyze/bin/pip install sslyze
    SECURESPLIT_SSLYZE=/tmp/sslyze/bin/sslyze pytest -m slow tests/e2e/test_scan.py
"""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from tests.e2e.house import Loopback, policy_of

POLICY = policy_of()


@pytest.fixture
def port(house):
    with Loopback(house.core(house.job(), POLICY), house.keys) as loop:
        yield loop.port


def s_client(port, *options, keys=None, name="alice", said=b""):
    """Exit code and all that openssl printed; with a client certificate where a key folder is given."""
    argv = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-servername", "localhost", *options]
    if keys is not None:
        folder = keys / name
        argv += ["-cert", folder / "cert.pem", "-key", folder / "key.pem", "-CAfile", folder / "ca.pem"]
        argv += ["-verify_return_error", "-verify_hostname", "localhost"]
    done = subprocess.run(list(map(str, argv)), input=said, capture_output=True, timeout=30, check=False)
    return done.returncode, (done.stdout + done.stderr).decode(errors="replace")


def test_openssl_gets_tls_1_3_and_nothing_else(house, port):
    code, text = s_client(port, "-tls1_3", keys=house.keys)
    assert code == 0, text
    assert "Verification: OK" in text
    assert "Protocol  : TLSv1.3" in text or "TLSv1.3, Cipher is TLS_" in text
    assert "New Session Ticket" not in text
    for old in ("-tls1", "-tls1_1", "-tls1_2"):
        code, text = s_client(port, old, "-cipher", "ALL:@SECLEVEL=0", keys=house.keys)
        assert code != 0, old
        assert "Cipher is (NONE)" in text, old


def test_openssl_is_told_by_an_alert_what_is_wrong(house, port):
    # Something has to be sent for openssl to read on behind the handshake, where TLS 1.3 has the server's verdict.
    code, text = s_client(port, "-tls1_3", "-ign_eof", said=b"GET / HTTP/1.1\r\n\r\n")
    assert code != 0
    assert "certificate required" in text


def test_openssl_cannot_send_early_data_or_resume(house, port, tmp_path):
    session = tmp_path / "session.pem"
    s_client(port, "-tls1_3", "-sess_out", session, keys=house.keys)
    assert (
        not session.exists()
        or "Early data was not sent" in s_client(port, "-tls1_3", "-sess_in", session, keys=house.keys)[1]
    )


@pytest.mark.slow
def test_sslyze_finds_nothing_below_tls_1_3(house, port, tmp_path):
    tool = os.environ.get("SECURESPLIT_SSLYZE")
    if not tool:
        pytest.skip("SECURESPLIT_SSLYZE names no sslyze; it needs an environment of its own")
    out, alice = tmp_path / "found.json", house.keys / "alice"
    argv = [
        tool, f"localhost:{port}", "--cert", alice / "cert.pem", "--key", alice / "key.pem", "--json_out", out,
        "--sslv2", "--sslv3", "--tlsv1", "--tlsv1_1", "--tlsv1_2", "--tlsv1_3", "--early_data", "--compression", "--reneg",
        "--heartbleed", "--openssl_ccs", "--robot", "--resum",
    ]  # fmt: skip
    subprocess.run(list(map(str, argv)), capture_output=True, timeout=300, check=False)
    (scan,) = json.loads(out.read_text())["server_scan_results"]
    assert scan["scan_status"] == "COMPLETED", scan["connectivity_error_trace"]
    found = scan["scan_result"]
    for old in ("ssl_2_0", "ssl_3_0", "tls_1_0", "tls_1_1", "tls_1_2"):
        assert found[f"{old}_cipher_suites"]["result"]["accepted_cipher_suites"] == [], old
    suites = {
        suite["cipher_suite"]["name"] for suite in found["tls_1_3_cipher_suites"]["result"]["accepted_cipher_suites"]
    }
    assert suites
    assert suites <= {"TLS_AES_256_GCM_SHA384", "TLS_AES_128_GCM_SHA256", "TLS_CHACHA20_POLY1305_SHA256"}
    assert not found["tls_1_3_early_data"]["result"]["supports_early_data"]
    assert not found["tls_compression"]["result"]["supports_compression"]
    assert not found["heartbleed"]["result"]["is_vulnerable_to_heartbleed"]
    assert not found["openssl_ccs_injection"]["result"]["is_vulnerable_to_ccs_injection"]
