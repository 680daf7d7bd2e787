"""Reading of preference data, from a file to the tokens of a pair."""

# Both constants are in this module so that settings and the command line can read them without importing torch.

#: Endings of the files that can be read.
FORMATS = (".jsonl", ".json", ".parquet", ".csv")
#: Why a pair may be left out, by the name that `filters` takes.
FILTERS = {
    "identical": "with chosen equal to rejected",
    "empty": "with an empty completion",
    "truncated": "with nothing of a completion left after truncation",
    "duplicates": "that repeat an earlier one",
}
