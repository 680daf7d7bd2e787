"""From a file to the tokens of a pair."""

# Both stand here, so that settings and the command line know them without importing torch.

#: Endings of the files that can be read.
FORMATS = (".jsonl", ".json", ".parquet", ".csv")
#: Why a pair may be left out, by the name that `filters` takes.
FILTERS = {
    "identical": "with chosen equal to rejected",
    "empty": "with an empty completion",
    "truncated": "with nothing of a completion left after truncation",
    "duplicates": "that repeat an earlier one",
}
