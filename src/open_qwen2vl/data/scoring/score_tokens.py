"""The whole numbers 0 to 100 as a model may write them: which tokens, and how likely each number is.

A tokenizer has a token for each number, or one for each digit, or something between; with or without a space before.
All spellings form one tree. Logits at its root (after the prompt) and at its few inner nodes ("8", "10", ...) give
the probability of every number, so that no text has to be generated.
"""

import torch
from transformers import PreTrainedTokenizerBase

SCORES = range(101)
# The space is what follows "ASSISTANT:" in LLaVA's prompts, and what some models learnt to write after a newline.
LEADS = ("", " ")


class ScoreTokens:
    """The tree of the spellings of 0 to 100 after `prompt`; a `ValueError` if the tokenizer cannot write numbers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: str):
        spellings = [paths for lead in LEADS if (paths := _spell(tokenizer, prompt, lead))]
        if not spellings:
            raise ValueError("the tokenizer has no spelling for each number from 0 to 100")
        paths = [path for own in spellings for path in own]  # 101 of each lead
        inner = {path[:end] for path in paths for end in range(1, len(path))}
        rows = sorted(node for node in inner if not any(node == other[:-1] for other in inner))
        depth = max(map(len, rows), default=0)
        self.rows = torch.zeros((len(rows), depth), dtype=torch.long)
        for number, row in enumerate(rows):
            self.rows[number, : len(row)] = torch.tensor(row)
        self.longest = max(map(len, paths))
        self._tokens = torch.tensor(sorted({token for path in paths for token in path}))
        self._digits = torch.tensor(
            [id for token, id in tokenizer.get_vocab().items() if token[:1] in set("0123456789")]
        )
        self._steps = self._flat_steps(paths, inner, rows, depth)

    def _flat_steps(self, paths: list[tuple], inner: set[tuple], rows: list[tuple], depth: int) -> torch.Tensor:
        """For each path, where in the flattened columns of all nodes the log probabilities of its steps stand."""
        column = {token: number for number, token in enumerate(self._tokens.tolist())}
        width = len(column) + 1
        node = {
            row[:end]: 1 + number * depth + end - 1
            for number, row in enumerate(rows)
            for end in range(1, len(row) + 1)
        }
        node[()] = 0
        nothing = (1 + len(rows) * depth) * width  # a column of zeros behind all others
        steps = torch.full((len(paths), self.longest + 1), nothing)
        for number, path in enumerate(paths):
            own = [node[path[:end]] * width + column[token] for end, token in enumerate(path)]
            if path in inner:
                own.append(node[path] * width + width - 1)
            steps[number, : len(own)] = torch.tensor(own)
        return steps

    def columns(self, logits: torch.Tensor) -> torch.Tensor:
        """Log probabilities of the tree's tokens and, last, of no digit following: fp32 `(..., tokens + 1)`."""
        logits = logits.float()
        total = logits.logsumexp(-1, keepdim=True)
        wanted = logits[..., self._tokens.to(logits.device)]
        no_digit = logits.index_fill(-1, self._digits.to(logits.device), -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([wanted, no_digit], -1) - total

    def probabilities(self, root: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
        r"""Probability of each number.

        A number has the probability that the answer begins with the tokens of its digits, after a space or not, and,
        where more digits could still make another number of the tree (with a token for each digit: after 1 to 9 and
        after 10), that none follows. What follows "73" is not asked: "73", "73\n" and "73 out of 100" are all 73.
        The 101 probabilities are divided by their sum.

        Args:
            root (`torch.Tensor` of shape `(batch, tokens + 1)`): `columns` of the logits after the prompt.
            nodes (`torch.Tensor` of shape `(batch, rows, depth, tokens + 1)`): `columns` after each token of `rows`.

        Returns:
            `torch.Tensor` of shape `(batch, 101)`, fp32.
        """
        table = torch.cat([root.flatten(1), nodes.flatten(1), root.new_zeros(len(root), 1)], 1)
        paths = table[:, self._steps.to(table.device)].sum(-1)  # (batch, leads * 101)
        return paths.unflatten(1, (-1, len(SCORES))).logsumexp(1).softmax(-1)


def expected_score(probabilities: torch.Tensor) -> torch.Tensor:
    """The mean of the numbers 0 to 100 under `(batch, 101)`: fp64 `(batch,)`."""
    return probabilities.double() @ torch.arange(len(SCORES), dtype=torch.float64, device=probabilities.device)


def parse_score(answer: str) -> float:
    """The whole number from 0 to 100 on the first line of an answer, as the original reads it; else NaN."""
    try:
        score = int(answer.split("\n")[0].strip(" ,;"))
    except ValueError:
        return float("nan")
    return float(score) if score in SCORES else float("nan")


def _spell(tokenizer: PreTrainedTokenizerBase, prompt: str, lead: str) -> list[tuple[int, ...]] | None:
    """Tokens of each number; `None` if one of them melts into the prompt, or two of them are the same."""
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    texts = [f"{prompt}{lead}{score}" for score in SCORES]
    all_ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    paths = [tuple(ids[len(before) :]) for ids in all_ids]
    whole = all(ids[: len(before)] == before for ids in all_ids)
    return paths if whole and all(paths) and len(set(paths)) == len(paths) else None
