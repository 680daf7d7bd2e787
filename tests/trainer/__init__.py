"""Tests of the trainer. They are a package, so that a file may have the same name as one in tests/."""
