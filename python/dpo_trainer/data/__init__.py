"""From a file to the tokens of a pair."""
