"""The demo in a real browser: upload, ask, read the streamed answer, stop, errors in the page, nothing remote."""

import json
import re
import socket
import sys
import time
from pathlib import Path

import httpx
import pytest
from PIL import Image
from playwright.sync_api import expect

from open_qwen2vl.chat.demo import Demo
from open_qwen2vl.chat.demo_page import find_examples, start
from open_qwen2vl.chat.terminal import Conversation, generation_options, load_model
from open_qwen2vl.cli import main
from tests.clips import clip, moving_frames

NAME = "<b>tiny</b> model"
expect.set_options(timeout=60_000)


@pytest.fixture
def images(tmp_path) -> Path:
    """Two images, one of them with a question, and a text that pretends to be a third."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.linear_gradient("L").convert("RGB").save(folder / "cat.png")
    Image.radial_gradient("L").convert("RGB").save(folder / "dogs.png")
    (folder / "dogs.txt").write_text("two dogs?\n")
    return folder


@pytest.fixture
def steps(talker) -> list[int]:
    """Grows by one with each token that the model computes, none so soon that a busy machine's browser is late."""
    taken = []

    def count(*_) -> None:
        taken.append(1)
        time.sleep(0.01)

    talker.lm_head.register_forward_hook(count)
    return taken


@pytest.fixture
def served(talker, processor, images):
    """The page of the tiny model, on a free port of this machine."""
    page = Demo(talker, processor, NAME).build(None, 8, find_examples(str(images)))
    start(page, "127.0.0.1", None)
    yield page
    page.close(verbose=False)


@pytest.fixture
def opened(served, browser):
    """The page in a browser, the URLs that it asked for and the errors of its console."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page, requests, errors = context.new_page(), [], []
    page.set_default_timeout(60_000)
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(served.local_url)
    page.locator("#message textarea").wait_for()
    yield page, requests, errors
    context.close()


def spoken(model, processor, turns, image_seq_length=None, max_new_tokens=8) -> list[str]:
    """Answers that the terminal's conversation gives."""
    conversation = Conversation(model, processor, image_seq_length, generation_options(max_new_tokens, 0.0))
    answers = []
    for files, text in turns:
        conversation.waiting = [Image.open(file).convert("RGB") for file in files]
        answers.append("".join(conversation.ask(text)))
    return answers


def send(page, text: str, *files: Path) -> None:
    if files:
        page.set_input_files("#message input[type=file]", [str(file) for file in files])
        expect(page.locator("#message .thumbnail-item")).to_have_count(len(files))
    page.fill("#message textarea", text)
    page.locator("#message .submit-button").click()


def wait_for_answer(page, number: int) -> str:
    """Text of an answer, once it is whole: the button sends again."""
    expect(page.locator("#chat [data-testid=bot]")).to_have_count(number)
    page.locator("#message .submit-button").wait_for()
    return page.locator("#chat [data-testid=bot]").nth(number - 1).inner_text()


def test_upload_ask_read_and_ask_again(opened, images, talker, processor):
    page, requests, errors = opened
    cat, dogs = images / "cat.png", images / "dogs.png"
    assert page.locator("h1").inner_text() == NAME
    send(page, "what is shown?", cat, dogs)
    first = wait_for_answer(page, 1)
    send(page, "and now?")
    second = wait_for_answer(page, 2)
    turns = [([cat, dogs], "what is shown?"), ([], "and now?")]
    expected = [answer.strip() for answer in spoken(talker, processor, turns)]
    assert [first.strip(), second.strip()] == expected and len(set(expected)) == 2
    # Another budget, for the conversation as a whole.
    page.locator("#budget input").click()
    page.get_by_role("option", name="9 tokens", exact=True).click()
    page.locator("#clear").click()
    expect(page.locator("#chat [data-testid=bot]")).to_have_count(0)
    page.get_by_text("two dogs?").click()
    expect(page.locator("#message textarea")).to_have_value("two dogs?")
    page.locator("#message .submit-button").click()
    wide, narrow = (spoken(talker, processor, [([dogs], "two dogs?")], budget)[0] for budget in (9, None))
    assert wait_for_answer(page, 1).strip() == wide.strip() != narrow.strip()
    assert errors == []
    assert [url for url in requests if not re.match(r"(http://127\.0\.0\.1:\d+/|data:|blob:)", url)] == []


def test_stop_ends_the_generation_and_errors_stand_in_the_page(opened, images, talker, steps, tmp_path):
    page, _, _ = opened
    page.fill("#max-new-tokens input[type=number]", "4000")
    page.keyboard.press("Tab")
    send(page, "two dogs")
    expect(page.locator("#chat [data-testid=bot]")).to_have_text(re.compile(".{20}"))
    page.locator("#message .stop-button").click()
    shown = wait_for_answer(page, 1)
    stopped = len(steps)
    assert 0 < stopped < 3500 and len(shown) > 20
    page.wait_for_timeout(300)
    assert len(steps) == stopped
    # A file that is no image, and a conversation that is too long: the message stays, to be changed.
    (tmp_path / "no<i>.png").write_text("no image")
    send(page, "what is shown?", tmp_path / "no<i>.png")
    page.get_by_text("cannot be read as an image").wait_for()
    page.wait_for_timeout(500)
    expect(page.locator("#message textarea")).to_have_value("what is shown?")
    assert page.locator("#chat [data-testid=bot]").count() == page.locator("#message .thumbnail-item").count() == 1
    assert page.locator("#notice i").count() == 0
    page.locator("#clear").click()
    expect(page.locator("#message textarea")).to_have_value("")
    talker.config.text_config.max_position_embeddings = 100
    send(page, "two dogs")
    page.get_by_text("too long: the conversation has").wait_for()
    expect(page.locator("#message textarea")).to_have_value("two dogs")
    assert page.locator("#chat [data-testid=user]").count() == 0 and len(steps) == stopped


def test_clear_while_an_answer_is_written_stays_clear(opened, steps):
    page, _, _ = opened
    page.fill("#max-new-tokens input[type=number]", "4000")
    page.keyboard.press("Tab")
    send(page, "two dogs")
    expect(page.locator("#chat [data-testid=bot]")).to_have_text(re.compile(".{20}"))
    page.locator("#clear").click()
    expect(page.locator("#chat [data-testid=bot]")).to_have_count(0)
    page.wait_for_timeout(700)
    assert page.locator("#chat [data-testid=bot]").count() == 0 and len(steps) < 3500
    page.locator("#message .submit-button").wait_for()


def test_an_answer_that_was_cleared_ends_with_what_the_page_shows_now(demo):
    """An update that is under way reaches the page after the clearing: the last one must not be that."""
    demo.take({"text": "two dogs", "files": []}, Request("a"))
    updates = demo.answer(None, 200, 0.0, Request("a"))
    assert next(updates)[1][-1]["role"] == "assistant"
    demo.clear(Request("a"))
    assert [chat.value for _, chat, _ in updates] == [[]]
    demo.take({"text": "two dogs", "files": []}, Request("a"))
    updates = demo.answer(None, 200, 0.0, Request("a"))
    next(updates)
    demo.clear(Request("a"))
    demo.take({"text": "and now?", "files": []}, Request("a"))
    (last,) = [chat.value for _, chat, _ in updates]
    assert [message["content"][0]["text"] for message in last] == ["and now?"]


def test_it_listens_to_this_machine_only_and_forbids_what_is_remote(served):
    response = httpx.get(served.local_url)
    assert response.status_code == 200 and "default-src 'self'" in response.headers["content-security-policy"]
    config = json.loads(httpx.get(f"{served.local_url}config").text)
    assert config["analytics_enabled"] is False and config.get("is_space") is not True
    port = int(served.local_url.rsplit(":", 1)[1].strip("/"))
    # Another address of this very machine, at which a server on 0.0.0.0 would answer.
    with socket.socket() as other:
        assert other.connect_ex(("127.0.0.2", port)) != 0


def test_many_examples_are_shown_from_the_first(talker, processor, tmp_path, browser):
    for number in range(60):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number:02}.png")
        (tmp_path / f"{number:02}.txt").write_text(f"question {number}")
    page = Demo(talker, processor, NAME).build(None, 8, find_examples(str(tmp_path)))
    start(page, "127.0.0.1", None)
    shown = browser.new_page(viewport={"width": 1280, "height": 900})
    shown.goto(page.local_url)
    shown.get_by_text("question 59", exact=True).wait_for()
    shown.wait_for_timeout(500)
    assert shown.get_by_text("question 0", exact=True).bounding_box()["y"] > 0
    shown.close()
    page.close(verbose=False)


def test_pages_of_other_sites_are_refused(served):
    port = served.local_url.rsplit(":", 1)[1].strip("/")
    for headers, status in (
        ({"Host": f"localhost:{port}"}, 200),
        ({"Host": f"[::1]:{port}", "Origin": f"http://localhost:{port}"}, 200),
        ({"Host": f"evil.example:{port}"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[evil"}, 403),
    ):
        assert httpx.get(served.local_url, headers=headers).status_code == status, headers
        assert httpx.post(f"{served.local_url}gradio_api/queue/join", json={}, headers=headers).status_code != 200


def test_nothing_is_taken_from_the_browser_but_text_uploads_and_settings(served):
    """A chat as an input would open any file that a browser says was in it, and so would an example's path."""
    kinds = {block["id"]: block["type"] for block in served.config["components"]}
    inputs = {kinds[number] for call in served.config["dependencies"] for number in call["inputs"]}
    assert inputs == {"multimodaltextbox", "dropdown", "slider"}
    assert served._queue.max_size == 128


class Request:
    """A page's request as gradio hands it over."""

    def __init__(self, session_hash: str):
        self.session_hash = session_hash


def ask(demo: Demo, session: str, text: str, *files) -> None:
    demo.take({"text": text, "files": [str(file) for file in files]}, Request(session))
    list(demo.answer(None, 2, 0.0, Request(session)))


@pytest.fixture
def demo(talker, processor, images) -> Demo:
    demo = Demo(talker, processor, NAME)
    demo.build(None, 2, find_examples(str(images)))
    return demo


def test_an_example_is_known_by_its_number(demo):
    class Event:
        index = 1
        value = {"text": "?", "files": [{"path": "/etc/passwd"}]}

    example = demo.take_example(Event())
    assert example["text"] == "two dogs?" and Path(example["files"][0]).name == "dogs.png"


def test_conversations_keep_small_images_and_are_few(demo, images, monkeypatch):
    Image.linear_gradient("L").resize((4000, 2000)).save(images / "large.png")
    ask(demo, "a", "what is shown?", images / "large.png")
    (image,) = [part["image"] for part in demo._talks["a"].conversation.messages[0]["content"] if "image" in part]
    assert image.size == (1536, 768)
    monkeypatch.setattr("open_qwen2vl.chat.demo.MOST_TALKS", 3)
    for session in "bcde":
        ask(demo, session, "two dogs")
    assert list(demo._talks) == ["c", "d", "e"]
    demo._talks["c"].used -= 4000
    ask(demo, "d", "two dogs")
    assert list(demo._talks) == ["d", "e"]


def test_a_video_is_shown_by_a_family_of_videos_and_refused_by_others(demo, qwen_vl_folder, tmp_path):
    (tmp_path / "a.mp4").write_bytes(clip(moving_frames(20), 10))
    (tmp_path / "b.mp4").write_bytes(b"none")
    said = demo.take({"text": "what?", "files": [str(tmp_path / "a.mp4")]}, Request("a"))[2].value
    assert "a.mp4 cannot be shown as a video: Open-Qwen2VL takes images; Qwen2-VL, 2.5 and 3 take videos" in said
    other = Demo(*load_model(str(qwen_vl_folder("qwen2_vl"))), NAME)
    other.build(None, 2, [])
    ask(other, "a", "what?", tmp_path / "a.mp4")
    (shown,) = [part["video"] for part in other._talks["a"].conversation.messages[0]["content"] if "video" in part]
    assert len(shown.frames) == 4 and other._talks["a"].shown[-1]["role"] == "assistant"
    said = other.take({"text": "and?", "files": [str(tmp_path / "b.mp4")]}, Request("a"))[2].value
    assert "b.mp4 cannot be shown as a video: cannot identify" in said and str(tmp_path) not in said


def test_few_questions_wait(demo, monkeypatch):
    monkeypatch.setattr("open_qwen2vl.chat.demo.MOST_WAITING", 2)
    for session in "ab":
        demo.take({"text": "two dogs", "files": []}, Request(session))
    kept, _, said = demo.take({"text": "two dogs", "files": []}, Request("c"))
    assert "Too many questions wait" in said.value and demo._talks["c"].stop is None and not demo._talks["c"].shown
    list(demo.answer(None, 2, 0.0, Request("a")))
    assert demo.take({"text": "two dogs", "files": []}, Request("c"))[1]


def test_examples_are_images_with_their_questions(images, tmp_path):
    assert [(example["text"], Path(example["files"][0]).name) for example in find_examples(str(images))] == [
        ("What is shown in the image?", "cat.png"),
        ("two dogs?", "dogs.png"),
    ]
    with pytest.raises(ValueError, match="no image there"):
        find_examples(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens=0"], "at least 1"),
        (["--examples=nowhere"], "--examples nowhere: no image there"),
        (["--port=80000"], "--port must be within 0 and 65535, got 80000"),
    ],
)
def test_a_wrong_option_is_one_line_before_anything_is_loaded(options, message, capsys):
    assert main(["demo", "nowhere", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("demo", "demo_page"):
        monkeypatch.delitem(sys.modules, f"open_qwen2vl.chat.{name}")
    assert main(["demo", "nowhere"]) == 2
    assert 'pip install "open-qwen2vl[demo]"' in capsys.readouterr().err
