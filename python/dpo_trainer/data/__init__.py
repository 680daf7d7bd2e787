"""From a file to the tokens of a pair."""

#: Endings of the files that can be read; here, so that the command line can look at a path without importing torch.
FORMATS = (".jsonl", ".json", ".parquet", ".csv")
