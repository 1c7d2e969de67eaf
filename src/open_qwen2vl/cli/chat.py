"""`open-qwen2vl chat`: a conversation in the terminal."""

from ..chat.options import ChatOptions as OPTIONS

SUMMARY = "talk with a model in the terminal"


def run(options: OPTIONS) -> None:
    """Talk until the user leaves."""
    from ..chat.terminal import chat

    budget = (options.image_seq_length, options.max_new_tokens, options.temperature)
    chat(options.model, options.image, options.video, *budget, options.save)
