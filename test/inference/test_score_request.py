"""`POST /score` and what else the server answers to programs: crops in, the CSV's fields out, and hostile callers."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from inference import score_request
from inference import server as http
from inference.ensemble import Ensemble
from inference.errors import UserError
from inference.server import ScoreEndpoint, Server
from test.support.processes import connections, until

CROPS = [np.random.default_rng(n).integers(0, 255, (96, 96, 3), dtype=np.uint8) for n in range(3)]


def png(crop: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(crop).save(stream, "PNG")
    return stream.getvalue()


def multipart(images: list[bytes], boundary: bytes = b"--limit", **fields: object) -> tuple[str, bytes]:
    """As curl -F and requests write it."""
    parts = [f'Content-Disposition: form-data; name="{k}"\r\n\r\n{v}'.encode() for k, v in fields.items()]
    for n, image in enumerate(images):
        head = f'Content-Disposition: form-data; name="image"; filename="{n}.png"\r\nContent-Type: image/png\r\n\r\n'
        parts.append(head.encode() + image)
    body = b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + boundary + b"--\r\n"
    return f"multipart/form-data; boundary={boundary.decode()}", body


def as_json(images: list[bytes], **fields: object) -> tuple[str, bytes]:
    content = {"images": [base64.b64encode(image).decode() for image in images], **fields}
    return "application/json", json.dumps(content).encode()


@pytest.fixture(scope="module")
def ensemble(miniature: Path) -> Ensemble:
    return Ensemble.load(miniature, "cpu", "fp32")


@pytest.fixture
def tasks() -> list[int]:
    return []


@pytest.fixture
def port(ensemble: Ensemble, tasks: list[int]) -> Iterator[int]:
    def task() -> dict[str, Any]:
        tasks.append(1)
        return {"pages": 1, "seconds": 0.0}

    with ThreadPoolExecutor(1) as pool:
        scorer = ScoreEndpoint(score_request.about(ensemble), partial(score_request.score, ensemble))
        server = Server(("127.0.0.1", 0), pool, task, scorer)
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server.server_port
        server.shutdown()
        server.server_close()


def raw(port: int, data: bytes, finish: bool = False) -> bytes:
    """What the server answers to these bytes; finish: our side is closed behind them."""
    with socket.create_connection(("127.0.0.1", port), timeout=600) as connection:
        connection.sendall(data)
        if finish:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        while block := connection.recv(65536):
            answer += block
        return answer


def ask(port: int, method: str, path: str, kind: str = "", body: bytes = b"") -> tuple[int, dict[str, Any]]:
    head = f"{method} {path} HTTP/1.0\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    head_back, _, content = raw(port, head.encode() + body).partition(b"\r\n\r\n")
    return int(head_back.split()[1]), json.loads(content)


@pytest.mark.parametrize("form", [multipart, as_json])
def test_answers_are_those_of_predict_with_the_columns_of_the_csv(form, port, ensemble) -> None:
    status, content = ask(port, "POST", "/score", *form([png(crop) for crop in CROPS], mpp=0.25))
    assert status == 200 and content["failed"] == 0
    expected = ensemble.predict(CROPS)
    for n, answer in enumerate(content["answers"]):
        assert list(answer) == ["p_atypical", "class", "fold_0", "fold_1", "spread", "ensemble"]
        assert answer["p_atypical"] == pytest.approx(expected.p_atypical[n], abs=1e-6)
        assert answer["fold_1"] == pytest.approx(expected.fold_p[1, n], abs=1e-6)
        assert answer["class"] == ("atypical" if answer["p_atypical"] >= 0.5 else "normal")


def test_an_image_that_cannot_be_read_has_its_reason_in_its_place(port) -> None:
    status, content = ask(port, "POST", "/score", *multipart([png(CROPS[0]), b"no image", b""], mpp=0.25))
    assert status == 200 and content["failed"] == 2
    assert "p_atypical" in content["answers"][0]
    assert all("expected" in answer["error"] for answer in content["answers"][1:])


def test_parts_are_images_by_their_name(port) -> None:
    kind, body = multipart([png(CROPS[0]), png(CROPS[1])], mpp=0.25)
    status, content = ask(port, "POST", "/score", kind, body.replace(b'; filename="1.png"', b""))
    assert status == 200 and len(content["answers"]) == 2 and not content["failed"]
    for wrong in (
        body.replace(b'name="image"; filename="1', b'name="mask"; filename="1'),
        body.replace(b"0.25", b'0.25\r\n----limit\r\nContent-Disposition: form-data; name="mpp"\r\n\r\n2'),
    ):
        status, content = ask(port, "POST", "/score", kind, wrong)
        assert status == 400 and "twice or as a file" in content["error"]


def test_another_scale_is_refused_or_resampled(port, ensemble) -> None:
    large = np.asarray(Image.fromarray(CROPS[0]).resize((192, 192), Image.Resampling.BICUBIC))
    status, content = ask(port, "POST", "/score", *multipart([png(large)], mpp=0.125))
    assert status == 400 and "mpp is 0.125; expected 0.25 within 10%" in content["error"]
    status, content = ask(port, "POST", "/score", *multipart([png(large)], mpp=0.125, resample="true"))
    small = np.asarray(Image.fromarray(large).resize((96, 96), Image.Resampling.BICUBIC))
    assert status == 200
    assert content["answers"][0]["p_atypical"] == pytest.approx(ensemble.predict([small]).p_atypical[0], abs=1e-6)


def test_who_answers_is_said_and_described(port, ensemble) -> None:
    status, content = ask(port, "GET", "/")
    assert status == 200 and content["ensemble"] == "miniature" and content["expected_mpp"] == 0.25
    assert content["members"][0]["base_sha256"] == ensemble.manifest.members[0].base_sha256
    status, described = ask(port, "GET", "/openapi.json")
    assert set(described["paths"]) == {"/", "/health", "/invoke", "/score"}
    assert ask(port, "GET", "/nothing")[0] == 404


@pytest.mark.parametrize(
    ("kind", "body", "reason"),
    [
        ("text/plain", b"x", "expected application/json or multipart/form-data"),
        ("application/json", b"{", "the JSON cannot be read"),
        ("application/json", b"[" * 4000, "the JSON cannot be read"),
        ("application/json", b'{"images": "abc", "mpp": 1}', "the JSON cannot be read"),
        ("application/json", b'{"images": ["!"], "mpp": 0.25}', "the JSON cannot be read"),
        ("application/json", b'{"images": [], "mpp": 0.25}', "has 0 images"),
        ("application/json", b'{"images": ["aaaa"]}', "has no mpp"),
        ("application/json", b'{"images": ["aaaa"], "mpp": NaN}', "mpp is nan"),
        ("application/json", b'{"images": ["aaaa"], "mpp": {}}', "mpp is {}"),
        ("application/json", b'{"images": ["aaaa"], "mpp": true}', "mpp is True"),
        ("application/json", b'{"images": ["aaaa"], "mpp": 0.25, "resmaple": true}', "the request has 'resmaple'"),
        ("application/json", b'{"images": ["aaaa"], "mpp": 0.5, "resample": "maybe"}', "resample is 'maybe'"),
        ("multipart/form-data", b"x", "multipart body cannot be read"),
        ("multipart/form-data; boundary=a", b"--a\r\n\r\nx", "multipart body cannot be read"),
        ("multipart/form-data; boundary=a", b"--a\r\n\r\nx\r\n--a--", "has 0 images"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(kind, body, reason, port) -> None:
    status, content = ask(port, "POST", "/score", kind, body)
    assert status == 400 and reason in content["error"]


@given(st.lists(st.binary(max_size=60), min_size=1, max_size=4))
def test_any_bytes_come_through_a_multipart_body(images) -> None:
    request = score_request.parse(*multipart(images, b"0123456789abcdefghij", mpp=0.25))
    assert request.images == images


@given(st.text(max_size=30), st.binary(max_size=200))
def test_any_request_is_read_or_refused(kind, body) -> None:
    for start in ("application/json", f"multipart/form-data; boundary={kind}", kind):
        try:
            score_request.parse(start, body)
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("path", ["/invoke", "/score"])
@pytest.mark.parametrize("length", ["9" * 5000, "-1", "²", "1e3", "x"])
def test_a_length_that_is_none_is_refused_and_nothing_runs(path, length, port, tasks, capfd) -> None:
    answer = raw(port, f"POST {path} HTTP/1.0\r\nContent-Length: {length}\r\n\r\n".encode())
    assert b" 400 " in answer.split(b"\r\n")[0] and b"Content-Length is" in answer
    assert not tasks and capfd.readouterr().err == ""


@pytest.mark.parametrize("path", ["/invoke", "/score"])
def test_a_request_that_is_cut_short_runs_nothing(path, port, tasks, capfd) -> None:
    answer = raw(port, f"POST {path} HTTP/1.0\r\nContent-Length: 100\r\n\r\nhalf".encode(), finish=True)
    assert b" 400 " in answer.split(b"\r\n")[0] and b"ended after 4 of 100 bytes" in answer
    assert not tasks and capfd.readouterr().err == ""


def test_a_request_that_is_too_large_is_refused_before_it_is_read(port) -> None:
    head = f"POST /score HTTP/1.0\r\nContent-Length: {score_request.BYTES + 1}\r\n\r\n"
    assert b"expected at most 67,108,864" in raw(port, head.encode())


def test_a_reset_connection_leaves_no_trace_on_stderr(port, tasks, capfd) -> None:
    for _ in range(5):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(b"POST /invoke HTTP/1.0\r\nContent-Length: 100\r\n\r\nhalf")
        linger = b"\1\0\0\0\0\0\0\0"  # closing sends a reset
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        connection.close()
    assert ask(port, "POST", "/invoke")[0] == 201
    assert tasks == [1] and capfd.readouterr().err == ""


def test_callers_that_left_do_not_hold_up_one_that_waits(ensemble) -> None:
    begun, go, ran = threading.Event(), threading.Event(), []

    def task() -> dict[str, Any]:
        ran.append(1)
        begun.set()
        assert go.wait(600)
        return {"pages": 1, "seconds": 0.0}

    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(2) as callers:
        server = Server(("127.0.0.1", 0), pool, task, ScoreEndpoint({}, lambda request: {}))
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        first = callers.submit(ask, server.server_port, "POST", "/invoke")
        assert begun.wait(600)
        before = connections()
        for _ in range(30):
            with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
                connection.sendall(b"POST /invoke HTTP/1.0\r\n\r\n")
        until(lambda: connections() == before + 30, "all of them to wait for their turn")
        last = callers.submit(ask, server.server_port, "POST", "/invoke")
        go.set()
        assert first.result()[0] == last.result()[0] == 201
        assert len(ran) == 2
        server.shutdown()
        server.server_close()


def test_a_request_with_too_many_pixels_is_refused_before_anything_is_decoded(port, monkeypatch) -> None:
    """A blank PNG of a few kilobytes has millions of pixels."""
    image = png(np.zeros((1024, 1024, 3), np.uint8))
    count = score_request.PIXELS // 1024**2 + 1
    monkeypatch.setattr(score_request, "read_crop", lambda *_: pytest.fail("it was decoded"))
    status, content = ask(port, "POST", "/score", *multipart([image] * count, mpp=0.25))
    assert status == 400 and "expected at most 268,435,456; split the request" in content["error"]


def test_json_of_many_values_is_refused_before_it_is_parsed(port) -> None:
    status, content = ask(port, "POST", "/score", "application/json", b"[" + b"{}," * 100_000 + b"{}]")
    assert status == 400 and "the JSON has" in content["error"]


@pytest.mark.parametrize(
    "headers", [{"Origin": "https://example.org"}, {"Host": "example.org:4743"}, {"Origin": "null"}]
)
@pytest.mark.parametrize(("method", "path"), [("POST", "/invoke"), ("POST", "/score"), ("GET", "/")])
def test_another_sites_page_starts_nothing_on_loopback(headers, method, path, port, tasks) -> None:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    answer = raw(port, f"{method} {path} HTTP/1.1\r\n{lines}Content-Length: 0\r\nConnection: close\r\n\r\n".encode())
    assert b" 403 " in answer.split(b"\r\n")[0] and not tasks
    own = f"GET / HTTP/1.0\r\nHost: localhost:{port}\r\nOrigin: http://127.0.0.1:{port}\r\n\r\n"
    assert b" 200 " in raw(port, own.encode()).split(b"\r\n")[0]


def test_more_requests_than_it_holds_are_told_to_come_later_and_health_answers(ensemble, monkeypatch) -> None:
    begun, go = threading.Event(), threading.Event()
    monkeypatch.setattr(http, "WAITING", 3)

    def task() -> dict[str, Any]:
        begun.set()
        assert go.wait(600)
        return {"pages": 1, "seconds": 0.0}

    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(4) as callers:
        server = Server(("127.0.0.1", 0), pool, task, ScoreEndpoint({}, lambda request: {}))
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        calls = [callers.submit(ask, server.server_port, "POST", "/invoke") for _ in range(3)]
        until(lambda: server.requests == 3, "all of them to be held")
        assert ask(server.server_port, "POST", "/invoke")[0] == 503
        assert ask(server.server_port, "GET", "/health")[0] == 200
        go.set()
        assert [call.result()[0] for call in calls] == [201] * 3
        server.shutdown()
        server.finish()


def test_a_caller_that_does_not_read_its_answer_holds_up_nobody(ensemble) -> None:
    with ThreadPoolExecutor(1) as pool:
        large = {"answers": ["x" * 1000] * 100_000}
        server = Server(("127.0.0.1", 0), pool, dict, ScoreEndpoint({}, lambda request: large))
        server.task = lambda: {"pages": 1, "seconds": 0.0}
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
            kind, body = as_json([png(CROPS[0])], mpp=0.25)
            head = f"POST /score HTTP/1.0\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            assert connection.recv(1)
            assert ask(server.server_port, "POST", "/invoke")[0] == 201
        server.shutdown()
        server.server_close()
