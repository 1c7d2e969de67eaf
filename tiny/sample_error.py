"""The one error of a sample, from its bytes to its pack: whoever meets it counts the sample by its reason."""


class SampleError(ValueError):
    """A sample, or part of one, that cannot be used; `reason`, as `corrupt_image`, is what it is counted under."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason
