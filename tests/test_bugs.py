"""One test for each fixed bug; its docstring is the story: symptom, cause, since when."""
