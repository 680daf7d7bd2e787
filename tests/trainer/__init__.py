"""Tests of the trainer, as a package so that their file names are their own."""
