"""`open-qwen2vl report`: evaluations side by side on one page."""

from ..evaluation.options import ReportOptions as OPTIONS

SUMMARY = "write one HTML page on what evaluations gave: scores with intervals, categories, samples"
BUCKETS = True


def run(options: OPTIONS) -> None:
    """Write the page, and print its size."""
    from ..evaluation.report import write_report

    page = write_report(options.results, options.output, options.samples_per_task)
    print(f"{page}: {page.stat().st_size / 1e6:.1f} MB")
