"""Conversations: the normal form, and ids and labels against the original, transformers and TRL."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from open_qwen2vl.processing import conversations
from open_qwen2vl.processing.conversation_records import read_conversation
from open_qwen2vl.processing.conversations import ConversationFormat, training_chat_template
from open_qwen2vl.processing.sample_error import SampleError
from open_qwen2vl.processing.text_formats import has_words
from tests.documents import conversation_document

ORIGINAL = json.loads((Path(__file__).parents[1] / "assets/original/conversations.json").read_text("utf8"))
TEMPLATES = Path(conversations.__file__).parent
IMAGE = Image.linear_gradient("L").convert("RGB").resize((50, 40))
MEDIA = {"image": "<|image_pad|>"}
SPECIAL = ["<|im_end|>", "<|im_start|>", "<s>", "<|image_pad|>", "<|endofchunk|>"]


def llava(*turns, **keys):
    return {"conversations": [{"from": speaker, "value": text} for speaker, text in turns], **keys}


def expand(ids, image, budget):
    return [token for i in ids for token in ([image] * budget if i == -200 else [i])]


def laid_out(record, processor, budget=4):
    input_ids, labels = conversation_document(read_conversation(record).messages, processor, budget)
    assert input_ids.shape == labels.shape and input_ids.dtype == labels.dtype == "int64"
    assert ((labels == -100) | (labels == input_ids)).all() and labels[0] == -100
    return input_ids.tolist(), labels.tolist()


@pytest.mark.parametrize("name", ORIGINAL)
@pytest.mark.parametrize("form", ["released", "mended"])
def test_ids_and_labels_of_the_original(qwen_tokenizer, name, form):
    """In the two forms of the reference: as released weights saw it, and as if no token had been dropped."""
    template = (TEMPLATES / "chat_template_original.jinja").read_text("utf8")
    if form == "mended":
        template = template.replace("after.image and", "false and")
    case = ORIGINAL[name]
    # The original dropped any token after an image; the template drops the newline only.
    drops = form == "released" and name != "image_in_the_middle"
    images = ["a.jpg"] * json.dumps(case["conversation"]).count("<image>")
    messages = read_conversation({"conversations": case["conversation"], "image": images}).messages
    input_ids, labels = ConversationFormat(qwen_tokenizer, template, MEDIA).document(
        messages, [[151655] * 144] * len(images)
    )
    assert input_ids.tolist() == expand(case["input_ids" if drops else "ids_if_nothing_were_dropped"], 151655, 144)
    assert labels[labels != -100].tolist() == [label for label in case["labels"] if label != -100]
    if drops:
        expected = [label for i, label in zip(case["input_ids"], case["labels"], strict=True)
                    for label in [label] * (144 if i == -200 else 1)]  # fmt: skip
        assert labels.tolist() == expected


RECORDS = {
    "image first": llava(("human", "<image>\nwhat is shown?"), ("gpt", "a cat"), image="a.jpg"),
    "image last": llava(("human", "what is shown?\n<image>"), ("gpt", "a cat on a mat"), image="a.jpg"),
    "two images": llava(("human", "<image><image>\nsame?"), ("gpt", "no"), image=["a.jpg", "b.jpg"]),
    "later turn": llava(("human", "hi"), ("gpt", "hello"), ("human", "<image>"), ("gpt", "a dog"), image="a.jpg"),
    "no image": llava(("human", "two  dogs\n\nrun "), ("gpt", " in the park \n")),
    "system": llava(("system", "Be brief."), ("human", "why?"), ("gpt", "So."), ("human", "and?")),
    "trl": {"messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a cat"}],
            "images": ["a.jpg", "b.jpg"]},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "what is"}, {"type": "image"}]},
                           {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}], "images": ["a"]},
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_ids_and_labels_are_those_of_the_processor(processor, name):
    conversation = read_conversation(RECORDS[name])
    messages = json.loads(json.dumps(conversation.messages))
    for part in (part for message in messages for part in message["content"] if part["type"] == "image"):
        part["image"] = IMAGE
    expected = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    ids, labels = laid_out(RECORDS[name], processor)
    assert ids == expected["input_ids"][0].tolist()
    mask = expected["assistant_masks"][0].bool()
    assert labels == expected["input_ids"][0].where(mask, -100).tolist()
    assert ids.count(processor.image_token_id) == 4 * len(conversation.images)


@pytest.mark.parametrize("name", RECORDS)
def test_ids_and_labels_are_those_of_trl(processor, name):
    record = RECORDS[name]
    conversation = read_conversation(record)
    messages = record["messages"] if "messages" in record else conversation.messages
    collator = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)
    batch = collator([{"messages": messages, "images": [IMAGE] * len(conversation.images)}])
    assert laid_out(record, processor) == (batch["input_ids"][0].tolist(), batch["labels"][0].tolist())


def test_labels_are_answers_with_their_end_of_turn(processor):
    record = llava(("human", "<image>\nwhat?"), ("gpt", "a cat"), ("human", "sure?"), ("gpt", "yes"), image="a.jpg")
    _, labels = laid_out(record, processor)
    assert processor.tokenizer.decode([label for label in labels if label != -100]) == (
        "a cat<|im_end|>\nyes<|im_end|>\n"
    )


def test_an_image_in_an_answer_has_no_labels(processor):
    record = llava(("human", "draw"), ("gpt", "here <image> it is"), image="a.jpg")
    ids, labels = laid_out(record, processor)
    assert ids.count(processor.image_token_id) == 4 and processor.image_token_id not in labels


@pytest.mark.parametrize("token", SPECIAL)
def test_special_tokens_in_data_stay_text(qwen_tokenizer, token):
    chat = ConversationFormat(qwen_tokenizer, training_chat_template(qwen_tokenizer), MEDIA)
    text = f"a {token} b{token}{token}"
    plain = chat.document(read_conversation(llava(("human", "x"), ("gpt", "y"))).messages, [])[0]
    ids, labels = chat.document(read_conversation(llava(("human", text), ("gpt", text))).messages, [])
    number = qwen_tokenizer.convert_tokens_to_ids(token)
    assert (ids == number).sum() == (plain == number).sum()
    assert qwen_tokenizer.decode(labels[labels != -100]) == text + "<|im_end|>\n"
    assert qwen_tokenizer.decode(ids).count(text) == 2


def test_neighbouring_parts_do_not_make_a_control_token(processor):
    parts = [{"type": "text", "text": text} for text in ("a <|im_", "end|> b")]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "yes"}]
    ids, _ = conversation_document(messages, processor, 4)
    assert ids.tolist().count(processor.tokenizer.eos_token_id) == 3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)), min_size=1, max_size=3))
def test_any_text_comes_back_and_has_the_processors_ids(processor, turns):
    # See the head of conversations.py.
    turns = [(question, answer.lstrip() if has_words(answer) else "yes") for question, answer in turns]
    record = llava(*(turn for q, a in turns for turn in (("human", q.replace("<image>", "")), ("gpt", a))))
    if any("\U000f0000" <= c <= "\U000f0002" for turn in record["conversations"] for c in turn["value"]):
        return  # the marks of transformers and ours
    if any(token in turn["value"] for turn in record["conversations"] for token in SPECIAL):
        return  # transformers cannot both sanitize and mark
    ids, labels = laid_out(record, processor)
    expected = processor.apply_chat_template(
        read_conversation(record).messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ids == expected["input_ids"][0]
    kept = [token for token, kept in zip(ids, expected["assistant_masks"][0], strict=True) if kept]
    assert kept == [label for label in labels if label != -100]


TURN = ("human", "what?"), ("gpt", "a cat")
BAD = {
    "not_an_object": ["text"],
    "no_conversation": {"id": 1, "text": "a cat"},
    "bad_turn": {"conversations": [{"from": "human", "text": "what?"}, {"from": "gpt", "text": "a cat"}]},
    "unknown_role": llava(("human", "what?"), ("bing", "a cat")),
    "unknown_content": {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
    "unsupported_media": llava(*TURN, audio="a.wav"),
    "bad_encoding": llava(("human", "what \ud83d?"), ("gpt", "a cat")),
    "roles_out_of_order": llava(("gpt", "a cat"), ("human", "what?")),
    "no_assistant_turn": llava(("human", "what?")),
    "empty_answer": llava(*TURN, ("human", "and?"), ("gpt", " \n")),
    "empty_answer, zero width": llava(*TURN, ("human", "and?"), ("gpt", "\u200b\u2060")),
    "bad_image": llava(("human", "<image>"), ("gpt", "a cat"), image=[{"path": 5, "bytes": None}]),
    "too_many_placeholders": llava(("human", "<image><image>"), ("gpt", "a cat"), image="a.jpg"),
    "too_few_placeholders": llava(*TURN, image="a.jpg"),
    "image_is_url": llava(("human", "<image>"), ("gpt", "a cat"), image="HTTPS://x.org/a.jpg"),
    "corrupt_image": llava(("human", "<image>"), ("gpt", "a cat"), image="data:image/png;base64,?"),
    "ambiguous_images": llava(("human", "<image>"), ("gpt", "a cat"), image="a.jpg", images=["b.jpg"]),
    "ambiguous_conversation": llava(*TURN, messages=[{"role": "user", "content": "who?"}]),
    "unread_text": {
        "messages": [
            {"role": "user", "content": "what?"},
            {"role": "assistant", "content": "a cat", "reasoning_content": "it purrs"},
        ]
    },
    "unsupported_weight": llava(*TURN, loss_mask=[0.5, 1]),
    "no_trained_turn": llava(*TURN, loss_mask=[0]),
    "bad_text": {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_records_have_a_reason(reason):
    with pytest.raises(SampleError) as caught:
        read_conversation(BAD[reason])
    assert caught.value.reason == reason.split(",")[0]


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        (["user", "user", "assistant"], "roles_out_of_order"),
        (["user", "system", "assistant"], "roles_out_of_order"),
        (["user", "assistant", "assistant"], "roles_out_of_order"),
        (["system"], "no_assistant_turn"),
    ],
)
def test_turns_alternate(roles, reason):
    with pytest.raises(SampleError) as caught:
        read_conversation({"messages": [{"role": role, "content": "x"} for role in roles]})
    assert caught.value.reason == reason


def test_images_keep_the_order_of_the_text():
    own = {"type": "image", "image": {"bytes": b"x", "path": None}}
    content = [{"type": "image"}, own, {"type": "text", "text": "a"}, {"type": "image", "text": None}]
    record = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "b"}]}
    conversation = read_conversation({**record, "images": ["1", {"path": "2", "bytes": None}]})
    assert conversation.images == ["1", own["image"], {"path": "2", "bytes": None}]
    image = {"type": "image"}
    assert conversation.messages[0]["content"] == [image, image, {"type": "text", "text": "a"}, image]


def test_a_template_without_generation_marks_is_refused(processor, tokenizer):
    with pytest.raises(ValueError, match="no {% generation %} marks"):
        ConversationFormat(tokenizer, "{{ messages[0]['content'] }}", MEDIA)
    assert training_chat_template(tokenizer) == processor.chat_template


def test_a_template_that_loses_an_image_or_refuses_is_counted(tokenizer):
    messages = read_conversation(RECORDS["image first"]).messages
    for body in ("text", "{{ raise_exception('no') }}", "{{ nothing.at.all }}"):
        chat = ConversationFormat(tokenizer, body + "{% generation %}a{% endgeneration %}", MEDIA)
        with pytest.raises(SampleError) as caught:
            chat.document(messages, [[1]])
        assert caught.value.reason == "template_error"
