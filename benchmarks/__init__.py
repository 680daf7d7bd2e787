"""`pytest benchmarks/`: one file per question, every method that answers it behind one interface, timed in one run."""
