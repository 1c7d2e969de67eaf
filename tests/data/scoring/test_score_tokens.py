"""The tree of numbers: equal to scoring each of the 101 strings alone, for every kind of tokenizer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from open_qwen2vl.data.scoring.score_tokens import ScoreTokens, expected_score, parse_score

NUMBERS = [f"{lead}{number}" for number in range(101) for lead in ("", " ")] * 3
THREE_DIGITS = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+"), "isolated")


def train(pre_tokenizer, decoder, texts, alphabet=()) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoder
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=list(alphabet), show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def byte_level(texts, split=None) -> PreTrainedTokenizerFast:
    step = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    both = step if split is None else pre_tokenizers.Sequence([split, step])
    return train(both, decoders.ByteLevel(), texts, pre_tokenizers.ByteLevel.alphabet())


# name: tokenizer, prompt, rows of its tree, tokens of the longest spelling
KINDS = {
    # As Qwen2: a token for each digit, one for the space.
    "digits": (lambda: byte_level(["a cat:"]), "is it a cat\n", 18, 4),
    # As GPT-2: a token for "85", another for " 85".
    "numbers": (lambda: byte_level(NUMBERS), "a cat:", 0, 1),
    # As Llama 3: up to three digits are one token, the space is another.
    "space and number": (lambda: byte_level(NUMBERS, THREE_DIGITS), "a cat:\n\n", 1, 2),
    # Some numbers are tokens and others are not; " 8" may start one.
    "mixed": (lambda: byte_level(["1 10 100 85 85 85 7 12 12 12 99 99 99 64 64"]), "a cat:", None, None),
    # As Llama 2: SentencePiece's mark for a space, digits alone.
    "sentencepiece": (
        lambda: train(
            pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace(), ["a cat: \n 0123456789"]
        ),
        "a cat:",
        18,
        4,
    ),
}


@pytest.fixture(scope="module")
def built():
    """Tokenizers by the name of their kind."""
    return {name: make() for name, (make, *_) in KINDS.items()}


@pytest.fixture(scope="module")
def language_model():
    """A tiny Qwen2 whose distributions are far from flat."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=640,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.4,
    )
    return Qwen2ForCausalLM(config).eval()


def log_probabilities(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def brute_force(model, tokenizer, prompt) -> torch.Tensor:
    """Each string scored alone, with a forward pass of its own."""
    before = tokenizer(prompt)["input_ids"]
    spelled = {
        (lead, number): tokenizer(f"{prompt}{lead}{number}")["input_ids"]
        for number in range(101)
        for lead in ("", " ")
    }
    assert all(ids[: len(before)] == before for ids in spelled.values())
    digits = [id for token, id in tokenizer.get_vocab().items() if token[0] in "0123456789"]
    totals = torch.zeros(101, dtype=torch.double)
    for (_, number), ids in spelled.items():
        steps = log_probabilities(model, ids)
        probability = sum(steps[i - 1, ids[i]] for i in range(len(before), len(ids))).exp()
        if any(other[: len(ids)] == ids and len(other) > len(ids) for other in spelled.values()):
            probability = probability * (1 - steps[-1].exp()[digits].sum())
        totals[number] += probability
    return totals / totals.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_the_tree_equals_each_string_scored_alone(built, language_model, kind):
    tokenizer, (_, prompt, rows, longest) = built[kind], KINDS[kind]
    tree = ScoreTokens(tokenizer, prompt)
    if rows is not None:
        assert (len(tree.rows), tree.longest) == (rows, longest)
    before = tokenizer(prompt)["input_ids"]
    root = tree.columns(log_probabilities(language_model, before)[None, -1])
    depth = tree.rows.shape[1]
    nodes = [log_probabilities(language_model, before + row)[-depth:] for row in tree.rows.tolist()]
    nodes = tree.columns(torch.stack(nodes))[None] if nodes else root.new_zeros(1, 0, 0, root.shape[-1])
    probabilities = tree.probabilities(root, nodes)
    expected = brute_force(language_model, tokenizer, prompt)
    torch.testing.assert_close(probabilities[0].double(), expected, atol=1e-6, rtol=1e-4)
    # A flat distribution would hide a confusion of numbers.
    assert expected.max() > 5 * expected.median()
    assert expected_score(probabilities).item() == pytest.approx((expected * torch.arange(101)).sum().item(), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [0, 1, 7, 10, 85, 100])
def test_a_certain_answer_is_its_number(built, kind, number):
    tokenizer, prompt = built[kind], KINDS[kind][1]
    tree = ScoreTokens(tokenizer, prompt)
    before = tokenizer(prompt)["input_ids"]
    answer = tuple(tokenizer(f"{prompt}{number}\n")["input_ids"][len(before) :])
    rows = [tuple(row) for row in tree.rows.tolist()]

    def logits(so_far):
        """Certain of the answer's next token; of the newline, or anything else that is no digit, elsewhere."""
        following = (
            answer[len(so_far)] if so_far == answer[: len(so_far)] and len(so_far) < len(answer) else answer[-1]
        )
        return torch.nn.functional.one_hot(torch.tensor(following), 640) * 40.0

    root = tree.columns(logits(())[None])
    nodes = [torch.stack([logits(row[:end]) for end in range(1, len(row) + 1)]) for row in rows]
    nodes = tree.columns(torch.stack(nodes))[None] if nodes else root.new_zeros(1, 0, 0, root.shape[-1])
    probabilities = tree.probabilities(root, nodes)
    assert probabilities.argmax().item() == number
    assert expected_score(probabilities).item() == pytest.approx(number, abs=1e-6)


def test_a_tokenizer_without_digits_is_refused():
    tokenizer = train(pre_tokenizers.Whitespace(), decoders.BPEDecoder(), ["a cat on a mat"])
    with pytest.raises(ValueError, match="no spelling for each number from 0 to 100"):
        ScoreTokens(tokenizer, "a cat")


@given(
    st.integers(0, 100),
    st.sampled_from(["", " "]),
    st.sampled_from(["", ",", ";", " ", "\n", "\nIt is good.", ";\n9"]),
)
def test_numbers_are_read_from_the_first_line(number, lead, end):
    assert parse_score(f"{lead}{number}{end}") == number


@pytest.mark.parametrize(
    "answer", ["", "\n85", "85.", "85/100", "85 out", "a85", "101", "-1", "1000", "8.5", "Score: 85"]
)
def test_all_else_is_no_score(answer):
    assert parse_score(answer) != parse_score(answer)
