"""`open-qwen2vl filter`: the pairs that stay, chosen by their scores."""

from ..data.filtering.options import FilterOptions as OPTIONS

SUMMARY = "choose pairs by their scores"
EPILOG = """
EXPR joins clauses with and, or, not and parentheses:
  NAME >= X          the score is X or more; also >, <= and <. NAME is the --name given to score (the scorer's by
                     default), with .PART where it has several values: clip, mlm-filter.semantic_understanding
  top(NAME, F)       the best fraction F of the pairs that have this score. Of those at the threshold some are drawn
                     by their uids and --seed, so that the expected number is met
  in(FILE.npy)       the uid stands in a file (dtype u8,u8: DFN's, or an earlier --output)
  basic()            DataComp's basic filter, from `score --scorer basic`: English, more than 2 words and 5
                     characters, smaller side at least 200 pixels, sides at most 3 : 1
  contaminated()     from `decontaminate`: a copy of an evaluation picture (similarity 0.85), or half of an evaluation
                     text is in the caption; contaminated(D): pictures within distance D, from 0 to 1
  balance(NAME, T)   from `score --scorer concepts`: of each concept about T pairs at most, of rarer ones all; pairs
                     that name no concept do not pass
A clause about a score that a pair does not have is neither true nor false, and so is its `not`; a pair is kept where
the whole of EXPR is true. --sql takes a SELECT instead. Example:  --keep "basic() and (top(clip, 0.3) or in(dfn.npy))"
"""
BUCKETS = True


def run(options: OPTIONS) -> None:
    """Filter, and print the report."""
    from ..data.filtering import select_pairs

    print(select_pairs(options))
