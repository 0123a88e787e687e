"""What a study found: its figures over seeds, its differences to a baseline, and a verdict for each claim."""
