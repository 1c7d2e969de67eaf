"""An endpoint that works, fails for a while, fails for good, and answers nonsense."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from open_qwen2vl import endpoint as module
from open_qwen2vl.endpoint import Answer, AnswerError, Endpoint, EndpointError, image_part
from tests.chat_server import chat_server, completion

HELLO = [{"role": "user", "content": "hello"}]


def test_answers_come_through_faults_and_from_several_threads(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    faults = iter([429, 503, 500])
    with chat_server(lambda request: (next(faults, 200), request["messages"][0]["content"])) as server:
        endpoint = Endpoint(server.url, "m")
        assert endpoint.ask(HELLO, temperature=0, max_tokens=5) == Answer("hello", True)
        assert len(server.requests) == 4 and set(server.keys) == {"Bearer sk-secret"}
        assert {**server.requests[0]} == {"messages": HELLO, "model": "m", "temperature": 0, "max_tokens": 5}
        with ThreadPoolExecutor(4) as pool:
            said = pool.map(lambda n: endpoint.ask([{"role": "user", "content": str(n)}]).text, range(20))
        assert list(said) == list(map(str, range(20)))


def test_the_only_model_is_taken():
    with chat_server(lambda request: (200, request["model"])) as server:
        assert Endpoint(server.url).ask(HELLO).text == Endpoint(server.url).model == "org/tiny"
        server.models = ["a", "b"]
        with pytest.raises(EndpointError, match=r"lists 2 models \(a, b\): --endpoint-model names one"):
            Endpoint(server.url)
        assert Endpoint(server.url, "b").ask(HELLO).text == "b"
    with pytest.raises(EndpointError, match="ConnectError: "):
        Endpoint(server.url, retries=0)


def test_an_answer_that_is_cut_off():
    with chat_server(lambda _: (200, completion("half of", "length"))) as server:
        assert Endpoint(server.url, "m").ask(HELLO) == Answer("half of", False)


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (400, {"error": {"message": "no such picture"}}, "refused_request"),
        (422, {"detail": "bad"}, "refused_request"),
        (200, b"<html>welcome</html>", "bad_answer"),
        (200, {"choices": []}, "bad_answer"),
        (200, [1], "bad_answer"),
        (200, completion(None), "bad_answer"),
    ],
)
def test_one_request_without_an_answer_is_counted_and_many_end_it(status, body, reason, monkeypatch):
    monkeypatch.setattr(module, "MOST_REFUSED", 3)
    with chat_server(lambda _: (status, body)) as server:
        endpoint = Endpoint(server.url, "m")
        with pytest.raises(AnswerError) as caught:
            endpoint.ask(HELLO)
        assert caught.value.reason == reason
        with pytest.raises(AnswerError):
            endpoint.ask(HELLO)
        with pytest.raises(EndpointError, match="no answer to 3 requests"):
            endpoint.ask(HELLO)
        server.reply = lambda _: (200, "again")
        assert endpoint.ask(HELLO).text == "again"  # and counts from there


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_what_is_wrong_with_the_endpoint_ends_it_without_its_key(status, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with chat_server(lambda _: (status, {"error": {"message": "not with sk-secret"}})) as server:
        with pytest.raises(EndpointError) as caught:
            Endpoint(server.url, "m", retries=1).ask(HELLO)
        assert server.url in str(caught.value) and "not with KEY" in str(caught.value)
        assert "secret" not in str(caught.value) and "\n" not in str(caught.value)
        assert len(server.requests) == (2 if status == 500 else 1)


def test_nobody_is_there():
    with chat_server(lambda _: (200, "")) as server:
        url = server.url
    with pytest.raises(EndpointError, match="refused"):
        Endpoint(url, "m", retries=0).ask(HELLO)
    with pytest.raises(ValueError, match="must begin with http"):
        Endpoint("localhost:80", "m")


def test_pictures_are_sent_as_they_are_or_as_png():
    from PIL import Image

    assert image_part(b"\xff\xd8\xff")["image_url"]["url"] == "data:image/jpeg;base64,/9j/"
    assert image_part(Image.new("RGB", (2, 2)))["image_url"]["url"].startswith("data:image/png;base64,iVBOR")


@pytest.mark.parametrize("url", ["http://user:verysecret@127.0.0.1:9/v1", "http://127.0.0.1:9/v1?api_key=verysecret"])
def test_a_url_with_a_secret_is_refused_and_not_repeated(url):
    with pytest.raises(ValueError, match="127.0.0.1:9/v1: the URL holds a user or a key") as error:
        Endpoint(url, "model")
    assert "verysecret" not in str(error.value)
