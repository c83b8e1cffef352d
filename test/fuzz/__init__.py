"""Coverage-guided fuzzing of everything that others' files reach: see __main__ for the command."""
