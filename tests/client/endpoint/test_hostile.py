"""The endpoint against bytes that no well-meaning program sends; after each of them it still answers the next one."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time

import pytest

from securesplit.client.client import Client
from securesplit.client.endpoint.admission import Admission
from securesplit.errors import BudgetExhausted, ConnectionFailed, InputError, PolicyDenied, RemoteProtocolError
from securesplit.transport.http import Head
from securesplit.transport.loopback import Bounds, Loopback
from tests.e2e.desk import endpoint, read_all, served
from tests.e2e.house import SILENT, build_house, policy_of
from tests.e2e.house import Loopback as Server

CHAT = "/v1/chat/completions"
BODY = {"model": "model", "messages": [{"role": "user", "content": "w10 w11"}], "max_tokens": 2}
BOUNDS = Bounds(connections=4, arriving=0.6, leaving=2.0, body=1 << 16)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return build_house(tmp_path_factory.mktemp("hostile") / "house")


@pytest.fixture(scope="module")
def running(house):
    with served(house, policy_of(), bounds=BOUNDS) as one:
        yield one


@pytest.fixture
def one(running):
    yield running
    assert running.ask("POST", CHAT, BODY)[0] == 200, "the endpoint is as it was"


def code_of(body: bytes) -> str:
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["code"]


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"Authorization": ""}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"Authorization": "Bearer securesplit-"}, 401),
        ({"Authorization": "Basic {token}"}, 401),
        ({"Authorization": "Bearer {token}x"}, 401),
        ({"Authorization": "Bearer \xff\xfe"}, 401),
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:{port}"}, 403),
        ({"Host": "127.0.0.1"}, 403),
        ({"Host": "127.0.0.1:1"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:{port}"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 403),
    ],
)
def test_who_is_not_admitted_learns_nothing(one, fields, status):
    filled = {k: v.format(token=one.ready.token, port=one.port) for k, v in fields.items()}
    lines = "".join(f"{k}: {v}\r\n" for k, v in {**one.headers(), **filled}.items())
    # No body: the refusal does not wait for one.
    got, told, body = one.raw(f"POST {CHAT} HTTP/1.1\r\n{lines}Content-Length: 100\r\n\r\n".encode("latin-1"))
    assert (got, code_of(body)) == (status, "SS-1274")
    assert one.ready.token.encode() not in body
    assert not [name for name in told if name.startswith("access-control")], "no page may read the answer"
    assert (told.get("www-authenticate") == "Bearer") == (status == 401)


def test_the_names_of_the_loopback_are_all_its_own(one):
    for host in ("localhost", "LOCALHOST", "127.0.0.1", "[::1]"):
        assert one.ask("GET", "/v1/models", Host=f"{host}:{one.port}")[0] == 200


def test_two_tokens_or_hosts_are_none(one):
    head = "".join(f"{k}: {v}\r\n" for k, v in one.headers().items())
    assert one.raw(f"GET /v1/models HTTP/1.1\r\n{head}Authorization: Bearer x\r\n\r\n".encode())[0] == 401
    assert one.raw(f"GET /v1/models HTTP/1.1\r\n{head}Host: evil.example\r\n\r\n".encode())[0] in {400, 403}
    assert one.raw(b"GET /v1/models HTTP/1.1\r\n\r\n")[0] in {400, 403}


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /v1/models HTTP/1.0\r\n\r\n",
        b"GET\r\n\r\n",
        b"\r\n\r\n\r\n x\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: a\r\n b: c\r\nX\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    ],
)
def test_what_is_no_request_is_refused(one, raw):
    status, _, body = one.raw(raw)
    assert (status, code_of(body)) == (400, "SS-1271")


def test_large_heads_and_bodies_are_refused_before_they_are_kept(one):
    head = "".join(f"{k}: {v}\r\n" for k, v in one.headers().items())
    long = "x" * (20 << 10)
    assert one.raw(f"GET /v1/models HTTP/1.1\r\n{head}X: {long}\r\n\r\n".encode())[0] == 413
    many = "".join(f"X-{i}: y\r\n" for i in range(120))
    assert one.raw(f"GET /v1/models HTTP/1.1\r\n{head}{many}\r\n".encode())[0] == 413
    status, _, body = one.raw(f"POST {CHAT} HTTP/1.1\r\n{head}Content-Length: {1 << 40}\r\n\r\n".encode())
    assert (status, code_of(body)) == (413, "SS-1273")
    with one.connect() as sock:  # Without a length, in chunks that never end.
        sock.sendall(f"POST {CHAT} HTTP/1.1\r\n{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        sent = 0
        try:
            while sent < 1 << 25:
                sock.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n")
                sent += 4096
        except OSError:
            pass
        assert sent < 1 << 25


def test_half_a_request_and_a_slow_one_are_given_up(one):
    head = "".join(f"{k}: {v}\r\n" for k, v in one.headers().items())
    whole = f"POST {CHAT} HTTP/1.1\r\n{head}Content-Length: 50\r\n\r\n{{".encode()
    began = time.monotonic()
    with one.connect() as sock:
        sock.sendall(whole)
        data = read_all(sock)
    assert data.startswith(b"HTTP/1.1 408 ")
    with one.connect() as sock:  # A byte now and then does not count as progress.
        for byte in b"GET /v1/models HTTP/1.1\r\n":
            try:
                sock.sendall(bytes([byte]))
            except OSError:
                break
            time.sleep(0.05)
        assert sock.recv(4096)[:12] == b"HTTP/1.1 408"
    assert time.monotonic() - began < 5
    with one.connect() as sock:  # Half of one, and then the end.
        sock.sendall(whole)
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock)[:12] == b"HTTP/1.1 400"


def test_more_connections_than_there_is_room_for_are_closed(one):
    with one.connect() as first, one.connect() as second, one.connect() as third, one.connect() as fourth:
        time.sleep(0.3)
        with one.connect() as fifth, contextlib.suppress(ConnectionResetError):
            assert fifth.recv(100) == b""
        for sock in (first, second, third, fourth):
            assert read_all(sock)[:12] == b"HTTP/1.1 408", "and those who say nothing make room"
    time.sleep(0.5)  # The endpoint lingers for those who have not closed yet.


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", CHAT),
        ("POST", "/v1/models"),
        ("POST", "/v1/embeddings"),
        ("OPTIONS", CHAT),
        ("GET", "/../x"),
    ],
)
def test_other_paths_and_methods_are_not_there(one, method, path):
    status, _, body = one.ask(method, path)
    assert (status, code_of(body)) == (404, "SS-1279")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'{"model": NaN}', b'{"a":1,"a":2}', b"\xff\xfe", b"[" * 30000, b'{"model":"\\ud800"}'],
)
def test_bodies_that_are_no_request(one, body):
    status, _, told = one.ask("POST", CHAT, body)
    assert (status, code_of(told)) == (400, "SS-1272")


def test_all_faults_at_once_and_no_value_is_echoed(one):
    body = {
        **BODY,
        "n": 3,
        "tools": [{"secret": "hunter2"}],
        "temperature": "hunter2",
        "hunter2 hunter2": 1,
        "logprobs": True,
    }
    status, _, told = one.ask("POST", CHAT, body)
    assert (status, code_of(told)) == (400, "SS-1272")
    message = json.loads(told)["error"]["message"]
    assert all(name in message for name in ("n:", "tools:", "temperature:", "logprobs:"))
    assert "hunter2" not in message


def test_nothing_of_a_request_is_logged(one, caplog):
    with caplog.at_level(logging.DEBUG, logger="securesplit"):
        one.ask("POST", CHAT, {**BODY, "messages": [{"role": "user", "content": "w33 w34"}]})
        one.ask("POST", CHAT, {**BODY, "messages": [{"role": "user", "content": "w33 <eos> w34"}]})
        one.ask("POST", CHAT, {**BODY, "w33": "w34"})
    assert not [r for r in caplog.records if "w33" in r.getMessage() or one.ready.token in r.getMessage()]
    assert [r for r in caplog.records if "SS-1276" in r.getMessage()], "the kind of a refusal is"


def test_an_expecting_client_is_told_to_go_on(one):
    data = json.dumps(BODY).encode()
    head = "".join(f"{k}: {v}\r\n" for k, v in one.headers().items())
    with one.connect() as sock:
        sock.sendall(
            f"POST {CHAT} HTTP/1.1\r\n{head}Expect: 100-continue\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        )
        assert sock.recv(100).startswith(b"HTTP/1.1 100 ")
        sock.sendall(data)
        assert read_all(sock).startswith(b"HTTP/1.1 200 ")


def steps_of(one) -> int:
    return one.opened[-1].link.step


def test_a_program_that_goes_stops_its_generation(one, monkeypatch):
    paused = Client.stream

    def slowly(self, *args, **options):
        for piece in paused(self, *args, **options):
            time.sleep(0.05)
            yield piece

    monkeypatch.setattr(Client, "stream", slowly)
    for stream in (True, False):
        before = steps_of(one)
        data = json.dumps({**BODY, "max_tokens": 40, "stream": stream}).encode()
        head = "".join(f"{k}: {v}\r\n" for k, v in one.headers().items())
        with one.connect() as sock:
            sock.sendall(f"POST {CHAT} HTTP/1.1\r\n{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            time.sleep(0.3)
        assert one.ask("POST", CHAT, {**BODY, "max_tokens": 1})[0] == 200, "the next one gets its turn"
        assert steps_of(one) - before < 30


def test_requests_at_once_are_answered_one_after_another(one):
    alone = json.loads(one.ask("POST", CHAT, BODY)[2])["choices"][0]["message"]["content"]
    answers: list[str] = []

    def ask() -> None:
        answers.append(json.loads(one.ask("POST", CHAT, BODY)[2])["choices"][0]["message"]["content"])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == [alone] * 4


def test_a_server_that_comes_back_is_reached_again(house):
    policy = policy_of()
    first = Server(house.core(house.job(blind=False), policy), house.keys)
    with first as loop:
        url = loop.url
        with endpoint(house, url, policy, bounds=BOUNDS) as one:
            before = one.ask("POST", CHAT, BODY)
            first.__exit__()
            again = Server(house.core(house.job(blind=False), policy), house.keys)
            object.__setattr__(again.shell._listen, "port", int(url.rsplit(":", 1)[1]))
            with again:
                after = one.ask("POST", CHAT, BODY)
    assert (before[0], after[0]) == (200, 200)
    texts = [json.loads(body)["choices"] for _, _, body in (before, after)]
    assert texts[0] == texts[1]


def test_a_session_that_is_lost_for_good_is_opened_anew(one, monkeypatch):
    whole, opened = Client.stream, len(one.opened)
    failing: list[Exception] = []

    def breaks(self, *args, **options):
        if failing:
            raise failing.pop()
        yield from whole(self, *args, **options)

    monkeypatch.setattr(Client, "stream", breaks)
    failing.append(ConnectionFailed("SS-3020", "x"))
    assert one.ask("POST", CHAT, BODY)[0] == 200, "the same request, over another session"
    assert len(one.opened) == opened + 1
    failing.append(RemoteProtocolError("SS-4010", "x"))
    status, _, body = one.ask("POST", CHAT, BODY)
    assert (status, code_of(body)) == (502, "SS-4010")
    assert one.ask("POST", CHAT, BODY)[0] == 200, "the next one, over another session"
    assert len(one.opened) == opened + 2
    failing.extend(ConnectionFailed("SS-3020", "x") for _ in range(2))
    status, _, body = one.ask("POST", CHAT, BODY)
    assert (status, code_of(body)) == (503, "SS-3020")


def test_a_session_that_breaks_after_the_program_went_is_opened_anew(one, monkeypatch):
    """Under a private policy the rest crosses then, and that may fail."""
    opened, left = len(one.opened), threading.Event()
    whole = Client.stream

    def breaks(self, *args, **options):
        try:
            for piece in whole(self, *args, **options):
                time.sleep(0.05)
                yield piece
        except GeneratorExit:
            left.set()
            raise RemoteProtocolError("SS-4010", "x") from None

    with monkeypatch.context() as patch:
        patch.setattr(Client, "stream", breaks)
        data = json.dumps({**BODY, "max_tokens": 40}).encode()
        head = "".join(f"{k}: {v}\r\n" for k, v in one.headers().items())
        with one.connect() as sock:
            sock.sendall(f"POST {CHAT} HTTP/1.1\r\n{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            time.sleep(0.3)
        assert left.wait(10)
    assert one.ask("POST", CHAT, BODY)[0] == 200
    assert len(one.opened) == opened + 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BudgetExhausted("SS-5002", "x"), 429),
        (ConnectionFailed("SS-3020", "x"), 503),
        (InputError("SS-1222", "x"), 400),
        (ValueError("private words"), 500),
    ],
)
def test_a_failure_within_a_stream_is_an_event(one, monkeypatch, error, status, caplog):
    whole = Client.stream

    def breaks(self, *args, **options):
        yield next(whole(self, *args, **options))
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Client, "stream", breaks)
        begun, _, body = one.ask("POST", CHAT, {**BODY, "stream": True})
        refused, _, _ = one.ask("POST", CHAT, BODY)
    assert (begun, refused) == (200, status)
    events = [json.loads(line.removeprefix("data: ")) for line in body.decode().split("\n\n") if line]
    assert events[-1]["error"]["code"] == getattr(error, "code", "SS-1003")
    assert b"[DONE]" not in body
    assert b"private words" not in body
    assert "private words" not in caplog.text


def test_it_listens_on_loopback_alone():
    for host in ("0.0.0.0", "::", "10.1.2.3", "gpu.example", ""):
        with pytest.raises(InputError) as caught:
            Loopback(host, 0)
        assert caught.value.code == "SS-1270"
    beyond = Loopback("0.0.0.0", 0, beyond=True)
    with pytest.raises(ConnectionFailed) as caught:
        Loopback("127.0.0.1", beyond.port)
    assert caught.value.code == "SS-3041"
    beyond.close()


def test_a_policy_without_generation_is_said_at_the_start(tmp_path, open_ledger):
    strict = policy_of(SILENT.replace("share = 0.6", "share = 1.0"))
    with (
        pytest.raises(PolicyDenied, match="SS-2010"),
        served(build_house(tmp_path / "h"), strict, ledger=open_ledger()),
    ):
        pass


def test_every_address_goes_by_any_name_and_one_address_by_its_own():
    def head(host):
        return Head("GET", "/v1/models", (("host", host), ("authorization", "Bearer t")))

    Admission.at("0.0.0.0", 80, "t").check(head("gpu.example:80"))
    Admission.at("10.0.0.1", 80, "t").check(head("10.0.0.1:80"))
    Admission.at("::1", 80, "t").check(head("[::1]:80"))
    for address in ("10.0.0.1", "::1"):
        with pytest.raises(InputError, match="SS-1274"):
            Admission.at(address, 80, "t").check(head("gpu.example:80"))


def test_the_port_of_http_may_be_left_out():
    assert "127.0.0.1" in (Admission.at("127.0.0.1", 80, "t").hosts or ())
    assert "127.0.0.1" not in (Admission.at("127.0.0.1", 8080, "t").hosts or ())


def test_it_listens_on_the_loopback_of_ipv6_too():
    try:
        listening = Loopback("::1", 0)
    except ConnectionFailed:
        pytest.skip("this machine has no IPv6")
    stop = threading.Event()
    asked: list[str] = []

    class Service:
        def admit(self, head):
            asked.append(head.path)
            raise InputError("SS-1279", "x")

        def answer(self, exchange):
            """Never reached."""

        def refuse(self, exchange, error):
            exchange.whole(404, error.code.encode(), ())

    thread = threading.Thread(target=listening.run, args=(Service(), stop.is_set))
    thread.start()
    with socket.create_connection(("::1", listening.port), timeout=5) as sock:
        sock.sendall(b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n")
        assert read_all(sock).endswith(b"SS-1279")
    stop.set()
    thread.join(5)
    listening.close()
    assert asked == ["/x"]
