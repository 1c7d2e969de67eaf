"""A model that acts by calling Python functions: observation, call, result, until it answers.

running.py       run: the loop, over a model or any other source of what the assistant writes
functions.py     a user's functions: their schemas, checked calls, results
transcripts.py   what happened, as a conversation that `open-qwen2vl pack` takes
"""

from ..lazy_names import lazy_names

_MODULES = {
    "ToolError": ".functions",
    "Transcript": ".transcripts",
    "run": ".running",
    "save_transcripts": ".transcripts",
}

__all__ = list(_MODULES)
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
