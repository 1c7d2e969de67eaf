"""`open-qwen2vl estimate`: what a recipe costs."""

from ..estimate.options import EstimateOptions as OPTIONS

SUMMARY = "tell memory, speed, hours and cost of a recipe on a kind of GPU (reads configs and plans, no weights)"


def run(options: OPTIONS) -> None:
    """Print the estimate."""
    import json

    from ..estimate.estimate import estimate_recipe

    result = estimate_recipe(options)
    print(json.dumps(result.as_dict(), indent=1) if options.json else result)
