"""The name that transformers 4 had for `AutoModelForImageTextToText`."""

from transformers import AutoModelForImageTextToText


class AutoModelForVision2Seq(AutoModelForImageTextToText):
    """The name that transformers 4 had for `AutoModelForImageTextToText`; transformers 5 removed it."""
